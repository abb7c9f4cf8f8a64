"""What is known: the ledger, and the output folder as a place."""
