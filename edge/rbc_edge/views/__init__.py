"""The ledger shown: tables, overlays, reports. Each can always be written again."""
