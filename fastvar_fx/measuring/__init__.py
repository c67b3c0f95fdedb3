"""Speed: what is run, alternating runs, and what they are compared with."""
