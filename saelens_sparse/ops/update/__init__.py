"""What an optimizer does with gradients that are sums over pairs."""
