"""PEFT LoRA adapters: read exactly as base + change, or refused by name."""
