"""What the user asked: the recipe's schema and its loader. No torch here."""
