"""What one call of generate leaves ready for the next: a page and a chat answer many times with the same model."""

from collections import Counter

from peft.tuners.lora import LoraLayer

from alpaca.answering.slots import longest_row, slot_places


class Standby:
    """Slots for `at_once` rows, and steps captured with them: one set for each adapter, and one for none, made when it
    is first asked for. Of one model, whose adapters are not merged."""

    def __init__(self, at_once):
        self.at_once, self.slots, self.captured = at_once, None, {}
        self.rows = Counter()  # that each adapter was asked for

    def take(self, rows, prefixes):
        """(slots, {adapter: CapturedStepper}), no longer here, for these rows; (None, {}) if there are none that fit."""
        slots, captured, self.slots, self.captured = self.slots, self.captured, None, {}
        if slots and self._fit(slots, captured, rows, prefixes):
            return slots, captured
        return None, {}

    def _fit(self, slots, captured, rows, prefixes):
        tokens = [len(prefix.tokens) for prefix in prefixes]
        return (
            slot_places(rows) <= 2 * slots.places
            and max(longest_row(rows), *tokens) <= slots.count * slots.places
            and sum(tokens) <= slots.shared_places
            and all(len(prefixes) <= step.prefixes for step in captured.values())
        )

    def forget(self, adapter):
        """That adapter is gone from the model, and with it the steps that were captured with it."""
        self.captured.pop((adapter,), None)

    def put(self, slots, captured):
        """Take back what rows no longer need."""
        slots.release_all()
        self.slots, self.captured = slots, captured


def adapter_in_use(model):
    """The names of the LoRA that a model computes with now; none where it has none, or it is switched off."""
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)
