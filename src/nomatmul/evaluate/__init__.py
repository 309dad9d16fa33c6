"""How good and how fast a model is: scores of a text, speed, memory.

Nothing here knows what kind of model it is handed: see `score.Scorer` for the protocol.
"""

from nomatmul.evaluate.score import Scorer, TextScore, score_text

__all__ = ["Scorer", "TextScore", "score_text"]
