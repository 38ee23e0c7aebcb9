"""The cut: scores choose what stays, coupled parameters are sliced together, a stock model comes out."""
