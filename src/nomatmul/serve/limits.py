"""Limits of requests, in one place; docs/serve-api.md states them.

OpenAI's own where it has one: biases, log-probabilities, tools.
"""

MAX_CHOICES = 128  # of a request: prompts times n
MAX_TOKENS = 1 << 20  # of a request: prompts times n times max_tokens
CHAT_TOKENS = 2048  # made at most for a chat request that names no maximum
COMPLETION_TOKENS = 16  # likewise of /v1/completions, as OpenAI has it
MAX_PROMPT = 1 << 20  # characters of all texts of a request, or token ids; cut in about a second
MAX_STOP = 16  # stop strings; OpenAI has 4, evaluation harnesses send more
MAX_STOP_LENGTH = 1024  # characters
MAX_BIASED = 300  # tokens with a bias
MAX_LOGPROBS = 20
MAX_OLD_LOGPROBS = 5  # of /v1/completions
MAX_TOOLS = 128
MAX_MESSAGES = 10_000
MAX_EMBEDDINGS = 2048  # inputs of a request for vectors, as OpenAI has it
MAX_EMBEDDED_TOKENS = 300_000  # of all of them, as OpenAI has it
MAX_ID_LENGTH = 256  # of names: models, tools, calls, states


def check_size(size: int) -> None:
    """Raise ValueError for more characters, or token ids, than a request's texts may have.

    To be asked before texts are cut into tokens: that takes long, and much memory.
    """
    if size > MAX_PROMPT:
        raise ValueError(
            f"{size} characters (or token ids) are more than the {MAX_PROMPT} of a request"
        )
