"""What shows the ledger: tables, overlays and reports. All of it can always be written again."""
