"""`spry compare`: methods x datasets x seeds, searched with equal budgets, told in one table."""
