"""What tuning leaves: prefixes, prompts, LoRA updates, their files, the store, and peft's formats."""
