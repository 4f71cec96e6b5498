"""The parts of serve.py: what a client sends (requests), the weights (models), the one thread that computes (engine),
what a client gets (replies), who may ask (guard), and how connections are bounded (connections)."""
