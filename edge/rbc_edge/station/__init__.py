"""Work: what comes in is planned, looked at and recorded."""
