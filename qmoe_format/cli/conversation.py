"""A chat with a model, turn by turn (needs transformers)."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from qmoe_format.cli.streaming import Streamer, stream
from qmoe_format.errors import QMoEError


class Conversation:
    """What user and model have said, and the keys and values of what the model has read."""

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        settings: dict[str, Any],
        new_tokens: int,
        system: str | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            settings: arguments of transformers' ``generate``, but for the number of tokens.
            new_tokens: the most that an answer has.
            system: the system message.

        Raises:
            QMoEError: ``argument`` if the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise QMoEError(
                "argument",
                "the tokenizer has no chat template, so the model is probably not made for chats",
                "use `qmoe generate`, or put a chat_template.jinja beside the checkpoint's "
                "config.json and convert it again",
            )
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self._tokenizer = tokenizer
        self._model = model
        self._settings = {**settings, "return_dict_in_generate": True}
        self._new_tokens = new_tokens
        self._forget()

    def answer(self, message: str, *, statistics: bool = False) -> None:
        """Answer a message of the user, and show the text as it comes.

        An answer that is interrupted stays in the conversation as far as it got; if it had not
        begun, the message is dropped, too, for templates want user and assistant to take turns.

        Args:
            statistics: as in ``stream``.

        Raises:
            QMoEError: ``argument`` if the chat template cannot write the conversation, or if that
                is too long for the model; ``checkpoint`` if transformers cannot run the model.
        """
        self.messages.append({"role": "user", "content": message})
        encoded = self._encoded()
        ids = encoded["input_ids"][0].tolist()
        settings = {**self._settings, "max_new_tokens": min(self._new_tokens, self._room(len(ids)))}
        known = len(self._cached_ids)
        if 0 < known < len(ids) and ids[:known] == self._cached_ids:
            settings["past_key_values"] = self._cache
        self._forget()  # an interruption may leave it with keys of some layers only
        streamer = Streamer(self._tokenizer)
        try:
            output = stream(self._model, encoded, settings, streamer, statistics)
        finally:
            if streamer.tokens:
                self.messages.append({"role": "assistant", "content": streamer.text})
            else:
                self.messages.pop()
        self._remember(output)

    def _encoded(self) -> Any:
        try:
            encoded = self._tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # the template is a program
            raise QMoEError(
                "argument",
                f"the tokenizer's chat template cannot write this conversation ({error})",
                "leave out --system if the template has no such role, or correct the template "
                "and convert the checkpoint again",
            ) from error
        encoded.pop("token_type_ids", None)
        return encoded.to(self._model.device)

    def _room(self, tokens: int) -> int:
        """How many tokens the model can add to a conversation."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return self._new_tokens
        if tokens >= positions:
            raise QMoEError(
                "argument",
                f"the conversation has {tokens:,} tokens, but the model has positions for "
                f"{positions:,}, the answer included",
                "start a new conversation",
            )
        return int(positions - tokens)

    def _forget(self) -> None:
        self._cache: Any = None
        self._cached_ids: list[int] = []

    def _remember(self, output: Any) -> None:
        """Keep the cache for the next turn, if every model goes on correctly from such a one.

        Not all do from a recurrent state or from keys of an index: Jamba and MiniMax do not.
        """
        cache = output.past_key_values
        if type(cache) is DynamicCache and all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        ):
            self._cache = cache
            # All but the last token, which the model has not read.
            self._cached_ids = output.sequences[0].tolist()[: cache.get_seq_length()]
