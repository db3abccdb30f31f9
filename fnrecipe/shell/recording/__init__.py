"""What a run records: the numbers of its steps, and the writers of records."""
