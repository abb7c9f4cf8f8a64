"""rbc_export: two trained networks in, one quantized bundle out, with a test of what int8 loses."""
