"""What a subnet will be worth."""
