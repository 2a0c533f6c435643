"""How an instant is chosen and marked: points, and what is quiesced for them."""
