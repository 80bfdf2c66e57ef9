"""What hosts on one framework share; each folder knows that framework."""
