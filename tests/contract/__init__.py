"""What every trainer's channel metrics must do, written once and run with each of them."""
