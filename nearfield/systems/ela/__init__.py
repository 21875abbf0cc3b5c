"""ELA: a gate for each row and each column of a convolutional network's maps, by convolutions along them."""
