"""All compression methods, one file each: `transforms/<family>/<method>.py` is `<family>.<method>` in a recipe."""
