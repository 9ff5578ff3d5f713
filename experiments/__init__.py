"""The experiments: one file a system, each with its presets."""
