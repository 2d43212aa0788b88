"""What stands beside a trained model, so that others talk to it in the tokens of its training."""

from typing import TYPE_CHECKING

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.checkpoint import tokenizer as tokenizers
from huatuo_jax.checkpoint.hf_export_config import exported_layout
from huatuo_jax.checkpoint.side_files import Talk
from huatuo_jax.data.chat import ChatTemplate
from huatuo_jax.data.chat_jinja import exported_source, gives_the_tokens, unread_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def talk_of(
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stop_token_ids: tuple[int, ...],
    cfg: BackboneConfig,
) -> Talk:
    """What is written beside a model that is talked to in a template.

    Args:
        template: of its dialogues.
        tokenizer: the model's.
        stop_token_ids: all that end an answer, see `generation_config.stop_token_ids`.
        cfg: the model.
    """
    exported = exported_tokenizer(template, tokenizer, model_type=exported_layout(cfg))
    return Talk(
        tokenizer=None if exported is tokenizer else exported,
        chat_template=exported_source(template, exported),
        stop_token_ids=stop_token_ids,
        vocab_size=cfg.vocab_size,
    )


def exported_tokenizer(
    template: ChatTemplate, tokenizer: "PreTrainedTokenizerBase", *, model_type: str
) -> "PreTrainedTokenizerBase":
    """The tokenizer that reads a template's text as training does, where it can be made to.

    Dialogues that are rendered here have the same tokens with either. The template's control tokens
    become special ones. Where tokens would reach over the border of two turns, texts are split
    before the marks of the turns, unless the tokenizer's class forgets that beside the model.

    Args:
        template: of the dialogues.
        tokenizer: the model's; it is left as it is, and returned where nothing has to change.
        model_type: of the exported model.
    """
    special = unread_tokens(template, tokenizer)
    exported = tokenizers.with_special_tokens(tokenizer, special)
    if not (template.turn_marks and exported.is_fast) or gives_the_tokens(template, exported):
        return exported
    split = tokenizers.with_splits_before(exported, template.turn_marks)
    fits = gives_the_tokens(template, split) and tokenizers.loads_beside(split, model_type)
    return split if fits else exported
