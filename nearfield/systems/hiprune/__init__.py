"""HiPrune: image tokens kept by what two layers of the vision tower attend to."""
