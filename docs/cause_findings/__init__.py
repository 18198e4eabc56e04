"""What the methods of causes find on networks that were not planted; each file has a `measure()`."""
