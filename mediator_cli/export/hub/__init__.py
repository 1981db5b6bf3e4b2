"""What mediator writes, on the Hugging Face Hub: pushed with a card and without the paths of this machine, pulled."""
