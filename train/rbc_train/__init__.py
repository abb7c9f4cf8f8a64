"""rbc_train: datasets from public smear images, labels, training and evaluation of the two models."""
