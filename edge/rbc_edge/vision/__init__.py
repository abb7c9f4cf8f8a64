"""Pixels to cells. No database, no clock, no walk over folders."""
