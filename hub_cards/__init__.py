"""Publishing on the Hub: cards, the push itself, a Space, and the authors' checkpoints."""
