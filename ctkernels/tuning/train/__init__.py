"""The training loop, what it trains, its masks, checkpoints and processes."""
