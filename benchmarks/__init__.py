"""What is measured: `device/` runs where the model runs, the rest runs over its records."""
