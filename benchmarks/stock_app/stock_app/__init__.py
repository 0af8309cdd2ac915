"""The heart study as a plain Flower app: Flower's FedAvg, Flower's messages, nothing of ours in the loop."""
