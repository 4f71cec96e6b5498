"""The parts of serve.py: what a client sends (requests), the weights (models), the one thread that computes (engine),
what a client gets (replies), who may ask (guard), how connections are bounded (connections), and how many threads
compute (threads)."""
