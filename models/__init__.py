"""Networks, losses, and the files that hold their weights."""
