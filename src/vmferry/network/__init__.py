"""What follows the guest on the network: its taps, its addresses, and the word where it is now."""
