"""Networks: Linen modules and nothing else."""
