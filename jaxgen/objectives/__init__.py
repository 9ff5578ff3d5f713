"""Losses: named mathematics per example, then make_loss, which calls a network."""
