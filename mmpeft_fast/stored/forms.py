"""Which form a method or a configuration has."""

from peft import PeftConfig

from mmpeft_fast.methods import Method, Prefix
from mmpeft_fast.stored.adapter import AdapterForm
from mmpeft_fast.stored.dora import DoRAForm
from mmpeft_fast.stored.form import Form
from mmpeft_fast.stored.ia3 import IA3Form
from mmpeft_fast.stored.layernorm import LayerNormForm
from mmpeft_fast.stored.lora import LoRAFAForm, LoRAForm
from mmpeft_fast.stored.own import OwnForm
from mmpeft_fast.stored.prefix import PrefixForm
from mmpeft_fast.stored.vera import VeRAForm

_OWN = OwnForm()
FORMS: tuple[Form, ...] = (
    *(LoRAForm(), LoRAFAForm(), DoRAForm(), VeRAForm(), IA3Form(), LayerNormForm(), PrefixForm(), AdapterForm()),
    _OWN,
)


def form_of(method: Method) -> Form:
    """The form of a method's very class: a subclass may compute something else, and is stored under its own name; so is
    a prefix of some layers alone, which HF PEFT has no word for."""
    if isinstance(method, Prefix) and method.layers is not None:
        return _OWN
    return next((form for form in FORMS if form.method is type(method)), _OWN)


def form_for(config: PeftConfig) -> Form | None:
    """The form of a configuration, or None where this package has none for it."""
    return next((form for form in FORMS if form.reads(config)), None)
