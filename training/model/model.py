"""The Hugging Face model: a frozen vision encoder, the connector, and a language model.

It runs from cached columns (training; no encoder in memory) or from pixels (inference). This file and what it imports
of ours travel with every exported model, so that it loads with `trust_remote_code=True` where this project is not
installed: they need torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from pipeline.encoders import encoder_of

from .loss import Loss
from .markers import IGNORE
from .placeholders import Places, ProposedText, VocabularyOnly, check_count, within_vocabulary
from .reducers import build_connector, connector_config
from .reducers.connector import Connector, Text, check_tower


class CompactVisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of the whole model.

    Attributes:
        text_config: of the language model.
        vision_config: of the vision tower; None for a model that is fed cached columns only.
        connector: fields of the connector's configuration (reducers.connector_config).
        image_token_id: placeholder of one vision token in `input_ids`. It lies just outside the vocabulary, so no
            text can contain it and the language model keeps its embeddings as they are.
        image_tokens: placeholders per image (derived from `connector`).
        aspect: how images become square, `pad` or `square`, as the features the model was trained on.
    """

    model_type = "compact_vision"
    sub_configs = {  # noqa: RUF012 - transformers' own way to declare them, in every version
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    connector: dict[str, Any] | None = None
    image_token_id: int | None = None
    image_tokens: int | None = None
    aspect: str = "pad"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):  # a file gives dicts
            self.text_config = _config_of(self.text_config or {}, "llama")
        if isinstance(self.vision_config, dict):
            self.vision_config = _config_of(self.vision_config, "clip_vision_model")
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        connector = connector_config(self.connector or {"llm_width": text.hidden_size})
        if connector.llm_width != text.hidden_size:
            raise ValueError(
                f"connector.llm_width is {connector.llm_width}, the language model's {text.hidden_size}; set it to that"
            )
        self.connector = asdict(connector)
        self.image_tokens = connector.tokens
        if self.image_token_id is None:
            self.image_token_id = text.vocab_size
        self.tie_word_embeddings = bool(text.tie_word_embeddings)


def _config_of(fields: dict[str, Any], default: str) -> PreTrainedConfig:
    known = {name: value for name, value in fields.items() if name != "model_type"}
    config: PreTrainedConfig = AutoConfig.for_model(fields.get("model_type") or default, **known)
    return config


@dataclass
class CompactVisionOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """What `forward` returns.

    Attributes:
        loss: mean cross-entropy over the supervised tokens, if labels were given.
        logits: (batch, kept positions, vocabulary); None in training and with `places`: supervised ones suffice there.
        image_hidden_states: (images, tokens, width) vision tokens, if images were given.
        right: (), how many supervised tokens have the largest logit; None in training, which does not look.
        by_group: (groups,), sums of cross-entropies in training, where `places` have groups.
        The rest is the language model's: its cache (`past_key_values`, from transformers 5.24 on `cache`), hidden
        states and attentions.
    """

    image_hidden_states: Tensor | None = None
    right: Tensor | None = None
    by_group: Tensor | None = None


class CompactVisionForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Vision encoder -> connector -> language model.

    Attributes:
        vision_tower: the encoder's module in transformers, or None where only cached columns are used.
        connector: makes vision tokens of the columns it needs.
        llm: a causal language model of transformers.
        loss_chunks: in how many parts a training loss is computed.
    """

    loss_chunks = 1
    config_class = CompactVisionConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    def __init__(self, config: CompactVisionConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        self.vision_tower: Any = None if vision is None else encoder_of(vision.model_type).build(vision)
        self.connector = build_connector(connector_config(config.connector))
        self.llm: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        llm: PreTrainedModel,
        connector: Connector,
        vision_tower: PreTrainedModel | None = None,
        aspect: str = "pad",
    ) -> CompactVisionForConditionalGeneration:
        """Put loaded parts together; no weight is copied or changed.

        Raises:
            ValueError: if the parts' widths do not fit.
        """
        config = CompactVisionConfig(
            text_config=llm.config,
            vision_config=None if vision_tower is None else vision_tower.config,
            connector=asdict(connector.config),
            aspect=aspect,
            dtype=llm.dtype,
        )
        if vision_tower is not None:
            check_tower(vision_tower.config, connector)
        with torch.device("meta"):  # the frame, without weights
            model = cls(config)
        model.llm, model.connector, model.vision_tower = llm, connector, vision_tower
        model.generation_config = llm.generation_config
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's initial weights for the connector, as LLaVA-1.5 has them. The other two parts know theirs."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.llm.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The language model's."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.llm.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """The language model's."""
        self.llm.set_output_embeddings(value)

    @torch.no_grad()  # the encoder is frozen always
    def encode_images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(n, 3, S, S) -> the columns that the connector needs, (n, grid*grid, C1) each, a CLS column (n, 1, C1).

        Raises:
            ValueError: if the model has no vision tower.
        """
        tower = self.vision_tower
        if tower is None:
            raise ValueError("this model has no vision tower; give it columns, or export it with its encoder")
        if tower.device.type != "meta":  # weights that a device_map keeps elsewhere come to their input
            pixel_values = pixel_values.to(tower.device)
        return encoder_of(tower.config.model_type).columns(tower, pixel_values, self.connector.columns)

    def get_image_features(self, pixel_values: Tensor, text: Text | None = None) -> Tensor:
        """(n, 3, S, S) -> vision tokens (n, tokens, width of the language model)."""
        features: Tensor = self.connector(self.encode_images(pixel_values), text)
        return features

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        logits_to_keep: int | Tensor = 0,
        places: Places | None = None,
        **kwargs: Any,
    ) -> CompactVisionOutput:
        """One pass.

        Args:
            input_ids: (batch, length), with `image_token_id` where vision tokens go.
            attention_mask: (batch, length), 1 for what is no padding.
            labels: (batch, length), -100 for what is not predicted; position i predicts label i + 1.
            columns: cached features, (images, grid*grid, C1) each, images in the order of their placeholders.
            pixel_values: (images, 3, S, S), instead of columns.
            inputs_embeds: (batch, length, width), instead of input_ids.
            position_ids: (batch, length).
            past_key_values, cache: keys and values of the positions before; from transformers 5.24 on `cache`.
            logits_to_keep: how many of the last positions, or which indices; 0 keeps all.
            places: what is known of a training batch, padded on the right; without it, the device is asked.
            **kwargs: to the language model without its head, `use_cache` among them.

        Raises:
            ValueError: if placeholders and vision tokens differ in number.
        """
        text = self._text(input_ids, attention_mask, labels, places)
        inputs_embeds, vision = self._inputs(input_ids, inputs_embeds, columns, pixel_values, text, places)
        if places is not None:  # the decoder is causal: no token sees padding, which is on its right
            attention_mask = None
        # Named above for `generate`, which reads the signature. A version of transformers knows one name of the cache.
        given = {"position_ids": position_ids, "past_key_values": past_key_values, "cache": cache}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        outputs = self.llm.get_decoder()(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        hidden = outputs.last_hidden_state
        logits = None
        if labels is None or not (self.training or places is not None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.llm.get_output_embeddings()(hidden[:, keep])
        loss, aside = None, None
        if labels is not None:
            entropy = Loss(self.llm.get_output_embeddings(), self.loss_chunks, self.training)
            loss, aside = entropy(hidden, labels, vision, places)
        return CompactVisionOutput(
            loss=loss,
            logits=logits,
            image_hidden_states=vision,
            right=None if self.training else aside,
            by_group=aside if self.training else None,
            **{name: value for name, value in outputs.items() if name != "last_hidden_state"},
        )

    def _text(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        places: Places | None = None,
    ) -> Text | None:
        """(batch, length) each -> for a connector that reads text: of rows with an image, the tokens not predicted."""
        if not self.connector.config.reads_text or input_ids is None:
            return None
        shown = input_ids == self.config.image_token_id
        mask = ~shown if attention_mask is None else ~shown & attention_mask[:, -input_ids.shape[1] :].bool()
        if labels is not None:
            mask = mask & (labels == IGNORE)
        rows = shown.any(dim=1).nonzero().squeeze(1) if places is None else places.rows
        return Text(self.get_input_embeddings()(input_ids[rows].masked_fill(~mask[rows], 0)), mask[rows])

    def _inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        columns: Mapping[str, Tensor] | None,
        pixel_values: Tensor | None,
        text: Text | None = None,
        places: Places | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the language model reads, (batch, length, width), and the vision tokens in it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"give exactly one of input_ids and inputs_embeds, not {'none' if input_ids is None else 'both'}"
            )
        if inputs_embeds is not None:
            if columns is not None or pixel_values is not None:
                raise ValueError(
                    "inputs_embeds came with an image, which has no place in them: put the vision tokens of "
                    "get_image_features there, and give no pixel_values; or give input_ids"
                )
            return inputs_embeds, None
        assert input_ids is not None
        if columns is None and pixel_values is not None:
            columns = self.encode_images(pixel_values)
        vision: Tensor | None = None if columns is None else self.connector(columns, text)
        return self._embed(input_ids, vision, places), vision

    def _embed(self, input_ids: Tensor, vision: Tensor | None, places: Places | None = None) -> Tensor:
        """Token embeddings (batch, length, width), with the vision tokens in their places."""
        if vision is None and input_ids.shape[1] == 1:
            embedded: Tensor = self.get_input_embeddings()(input_ids)  # a step of decoding
            return embedded
        shown = input_ids == self.config.image_token_id
        embeds: Tensor = self.get_input_embeddings()(input_ids.masked_fill(shown, 0))
        at = shown.flatten().nonzero().squeeze(1) if places is None else places.vision  # (n * tokens,)
        check_count(len(at), vision, self.config)
        if vision is None:
            return embeds
        tokens = vision.to(embeds.device, embeds.dtype).flatten(0, 1)  # (n * tokens, width)
        at = at.to(embeds.device)
        # No view: to torch.compile a view is another input than what comes out of a layer, with a graph of its own.
        return embeds.index_put((at // embeds.shape[1], at % embeds.shape[1]), tokens)

    def _get_logits_processor(self, *args: Any, encoder_input_ids: Any = None, **kwargs: Any) -> LogitsProcessorList:
        """transformers' list, which never sees an id beyond the vocabulary."""
        if encoder_input_ids is not None:
            encoder_input_ids = within_vocabulary(encoder_input_ids, self.config.image_token_id)
        made = super()._get_logits_processor(*args, encoder_input_ids=encoder_input_ids, **kwargs)
        return VocabularyOnly(made, self.config.image_token_id)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' proposer of tokens to try, which never proposes a placeholder of the prompt."""
        made = super()._get_candidate_generator(*args, **kwargs)
        if not isinstance(made, PromptLookupCandidateGenerator):
            return made  # models that propose may see images themselves
        return ProposedText(made, self.config.image_token_id)

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,  # `generate` takes them only where they are named here
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', which sends pixels with the prompt only; the same for cached columns."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("columns", None)
        return inputs


class CompactVisionModel(CompactVisionForConditionalGeneration):
    """The same weights up to the last hidden state: what `AutoModel` loads, for servers that bring their own head."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the parent's, without labels and logits -> BaseModelOutputWithPast."""
        text = self._text(input_ids, kwargs.get("attention_mask"), None)
        embeds, _ = self._inputs(input_ids, inputs_embeds, columns, pixel_values, text)
        return self.llm.get_decoder()(inputs_embeds=embeds, **kwargs)
