"""What is measured: pure functions of samples, features and labels."""
