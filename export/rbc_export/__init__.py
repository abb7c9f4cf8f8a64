"""rbc_export: two trained networks in, one quantized bundle out, with proof that nothing was lost."""
