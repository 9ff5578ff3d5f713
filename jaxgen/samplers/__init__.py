"""Samplers: chains for one lax.scan driver."""
