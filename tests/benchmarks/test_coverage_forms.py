"""Test what the report of diffusers' pipelines reads of their guidance: small ones, one of each form.

Most of them are run as well: what the report says of a pipeline is what the tracer does with it.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.coverage.forms import FUSED_FORMS, SEEN_THROUGH, guidance_of
from benchmarks.coverage.reading import read_steps
from benchmarks.coverage.rows import row_of, served_names
from benchmarks.coverage.sources import source_in
from tests.support.pipelines import FreeModel
from tests.support.scheduler_pair import diffusers, fused

PIPELINE = """
class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, unet, prior, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, prior=prior, scheduler=scheduler)

    @property
    def guidance_rescale(self):
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    def predicted(self, x, t):
        return self.unet(x, t)[0]

    @torch.no_grad()
    def __call__(self, latents, image=None, s=7.5, guidance_scale=7.5, guidance_rescale=0.0, true_cfg_scale=1.0):
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        x2, x3 = torch.cat([latents] * 2), torch.cat([latents] * 3)
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            {body}
            latents = self.scheduler.step(pred, t, latents, return_dict=False)[0]
        return latents


def rescale_noise_cfg(noise_cfg, noise_pred_text, guidance_rescale=0.0):
    dims = list(range(1, noise_cfg.ndim))
    rescaled = noise_cfg * (noise_pred_text.std(dim=dims, keepdim=True) / noise_cfg.std(dim=dims, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * noise_cfg


def normalized_guidance(cond, uncond):
    return cond + 7.5 * torch.nn.functional.normalize(cond - uncond, dim=1)
"""

BATCH, CALLS = "one call", "two calls"
HALVES = "u, c = self.unet(x2, t)[0].chunk(2)"
TWO = "c = self.unet(latents, t)[0]; u = self.unet(latents, t)[0]"
U_FORM, C_FORM = "u + s(c - u)", "c + s(c - u)"

READ_AND_RUN = {  # what is between the model and the step; form, calls, changes
    "one call": (f"{HALVES}; pred = u + s * (c - u)", U_FORM, BATCH, ()),
    "one call, from c": (f"{HALVES}; pred = c + s * (c - u)", C_FORM, BATCH, ()),
    "two calls": (f"{TWO}; pred = u + s * (c - u)", U_FORM, CALLS, ()),
    "two calls, from c": (f"{TWO}; pred = c + s * (c - u)", C_FORM, CALLS, ()),
    "one name for both": (
        "pred = self.unet(latents, t)[0]; u = self.unet(latents, t)[0]; pred = u + s * (pred - u)", U_FORM, CALLS, (),
    ),
    "the other way round": (f"{HALVES}; pred = (c - u) * s + u", U_FORM, BATCH, ()),
    "line by line": (f"{HALVES}; pred = c - u; pred = s * pred; pred = u + pred", U_FORM, BATCH, ()),
    "torch.chunk": ("u, c = torch.chunk(self.unet(x2, t)[0], 2); pred = u + s * (c - u)", U_FORM, BATCH, ()),
    "by a method": ("u, c = self.predicted(x2, t).chunk(2, dim=0); pred = u + s * (c - u)", U_FORM, BATCH, ()),
    "an alias of the model": (
        f"model = self.unet; {HALVES.replace('self.unet', 'model')}; pred = u + s * (c - u)", U_FORM, BATCH, (),
    ),
    "rescaled on demand": (
        f"{HALVES}; pred = u + s * (c - u)\n            if self.guidance_rescale > 0:\n"
        "                pred = rescale_noise_cfg(pred, c, self.guidance_rescale)", U_FORM, BATCH, (),
    ),
    "rescaled": (f"{HALVES}; pred = rescale_noise_cfg(u + s * (c - u), c, 0.7)", "rescaled", "", ()),
    "norm rescaled": (
        f"{HALVES}; pred = u + s * (c - u); pred = pred * (torch.norm(c, dim=-1, keepdim=True)"
        " / torch.norm(pred, dim=-1, keepdim=True))", "norm rescaled", "", (),
    ),
    "norm rescaled, and in another shape": (
        f"{HALVES}; pred = u + s * (c - u); pred = pred * (torch.norm(c, dim=-1, keepdim=True)"
        " / torch.norm(pred, dim=-1, keepdim=True)); pred = pred.flatten(1).view(1, 4, 2, 2)",
        "norm rescaled", "", ("shape after norms",),
    ),
    "adaptive projected": (f"{HALVES}; pred = normalized_guidance(c, u)", "adaptive projected", "", ()),
    "lerp": (f"{HALVES}; pred = torch.lerp(u, c, s)", "lerp", "", ()),
    "weights": (f"{HALVES}; pred = (s + 1.0) * c - s * u", "weights", "", ()),
    "scale per frame": (
        "scales = torch.linspace(1.0, guidance_scale, 4).reshape(1, 4, 1, 1)\n"
        f"            {HALVES}; pred = u + scales * (c - u)", "scale per frame", "", (),
    ),
    "three conditions": (
        "c, i, u = self.unet(x3, t)[0].chunk(3); pred = u + s * (c - i) + 1.5 * (i - u)", "several conditions", "", (),
    ),
    "as many as there are edits": (
        "n = len(x2) // len(latents); p = self.unet(x2, t)[0].chunk(n); pred = p[0] + (s * (p[1] - p[0])).abs()",
        "more conditions", "", (),
    ),
    "none": ("pred = self.unet(latents, t)[0]", "none", "", ()),
    "none, changed": ("pred = -self.unet(latents, t)[0].float()", "none", "", ()),
    "cast before": (
        "pred = self.unet(x2, t)[0].float(); u, c = pred.chunk(2); pred = u + s * (c - u)", U_FORM, BATCH,
        ("cast before",),
    ),
    "cast after": (f"{HALVES}; pred = (u + s * (c - u)).to(torch.float32)", U_FORM, BATCH, ("cast after",)),
    "slice before": (
        f"{TWO}; c, u = c[:, :4], u[:, :4]; pred = u + s * (c - u)", U_FORM, CALLS, ("slice before",),
    ),
    "slice after": (f"{HALVES}; pred = (u + s * (c - u))[:, :4]", U_FORM, BATCH, ("slice after",)),
    "halves by slices": (
        "pred = self.unet(x2, t)[0]; u, c = pred[:1], pred[1:]; pred = u + s * (c - u)", U_FORM, BATCH,
        ("slice before",),
    ),
    "split": (
        f"{HALVES}; u, c = u.split(4, dim=1), c.split(4, dim=1); pred = u[0] + s * (c[0] - u[0])", U_FORM, BATCH,
        ("split before",),
    ),
    "negated after": (f"{HALVES}; pred = -(u + s * (c - u))", U_FORM, BATCH, ("negate after",)),
    "a sum after": (f"{HALVES}; pred = latents + (u + s * (c - u))", U_FORM, BATCH, ("sum after",)),
    "the other prediction of the latents": (
        f"{TWO}; c, u = latents - c, latents - u; pred = u + s * (c - u)", U_FORM, CALLS, ("sum before",),
    ),
    "converted": (
        f"{TWO}; a = self.scheduler.alphas_cumprod[t]; c, u = latents - a * c, latents - a * u\n"
        "            pred = (latents - (c + s * (c - u))) / a", C_FORM, CALLS,
        ("sum before", "multiple before", "multiple after", "sum after"),
    ),
    "masked": (
        f"{TWO}; mask = (latents > 0).float(); c, u = c * (1 - mask), u * (1 - mask); pred = u + s * (c - u)",
        U_FORM, CALLS, ("masked before",),
    ),
    "masked, or nothing": (
        f"{TWO}; mask = (latents > 0).float()\n"
        "            c = c * mask if mask.sum() > 0 else torch.zeros_like(c)\n"
        "            u = u * mask if mask.sum() > 0 else torch.zeros_like(u); pred = u + s * (c - u)",
        U_FORM, CALLS, ("masked before", "zeros_like before"),
    ),
    "masked after": (
        f"{TWO}; mask = (latents > 0).float(); pred = (u + s * (c - u)) * (1 - mask)", U_FORM, CALLS, ("masked after",),
    ),
    "arithmetic before": (
        f"{TWO}; c, u = c ** 3, u ** 3; pred = u + s * (c - u)", U_FORM, CALLS, ("arithmetic before",),
    ),
    "compared before": (
        f"{TWO}; m = latents > 0; c, u = c * m, u * m; pred = u + s * (c - u)", U_FORM, CALLS,
        ("masked before",),
    ),
    "rescaled, and of originals": (
        f"{TWO}; c, u = latents - c, latents - u\n"
        "            pred = latents - rescale_noise_cfg(u + s * (c - u), c, 0.7).float()", "rescaled", "", (),
    ),
    "rescaled, a part": (
        f"{HALVES}; pred = rescale_noise_cfg(u + s * (c - u), c, 0.7)[:, :4]", "rescaled", "",
        ("slice after rescaling",),
    ),
    "rescaled, masked": (
        f"{HALVES}; mask = (latents > 0).float(); pred = rescale_noise_cfg(u + s * (c - u), c, 0.7) * (1 - mask)",
        "rescaled", "", ("masked after rescaling",),
    ),
    "shape after": (
        f"{HALVES}; pred = (u + s * (c - u)).flatten(1).reshape(latents.shape)", U_FORM, BATCH, ("shape after",),
    ),
    "a function after": (f"{HALVES}; pred = torch.clip(u + s * (c - u), -9, 9)", U_FORM, BATCH, ("clip after",)),
    "the conditional half first": (
        "c, u = self.unet(x2, t)[0].chunk(2); pred = u + s * (c - u)", U_FORM, BATCH, ("conditional first",),
    ),
    "two of three": (
        "u, c, _ = self.unet(x3, t)[0].chunk(3); pred = u + s * (c - u)", U_FORM, BATCH, ("not in halves",),
    ),
    "halves of two calls": (
        f"{HALVES}; _, c = self.unet(x2, t)[0].chunk(2); pred = u + s * (c - u)", U_FORM, CALLS,
        ("halves of two calls",),
    ),
    "another model": (f"{HALVES.replace('unet', 'prior')}; pred = u + s * (c - u)", U_FORM, BATCH, ()),
    "a branch that is not known": (
        f"{HALVES}; pred = u + s * (c - u)\n            if latents.numel() > 1:\n                pred = pred.float()",
        U_FORM, BATCH, ("cast after",),
    ),
}  # fmt: skip


def source_with(body, changes=()):
    text = PIPELINE.replace("{body}", body)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return source_in(text, "Pipeline"), text


def guidance(body, changes=(), **options):
    source, _ = source_with(body, changes)
    (step,) = read_steps(source, **options)
    return guidance_of(step, source.methods)


@pytest.mark.parametrize("name", READ_AND_RUN)
def test_what_is_read_of_a_pipeline_is_what_happens_when_it_runs(name):
    body, form, calls, changes = READ_AND_RUN[name]
    source, text = source_with(body)
    row = row_of(source, served_names())
    assert (row.form, row.calls, row.changes) == (form, calls, changes)
    assert row.fused == ((FUSED_FORMS[form] and not set(changes) - SEEN_THROUGH) or form == "none")

    names = {"torch": torch, "diffusers": diffusers, "DDIMScheduler": diffusers.DDIMScheduler}
    exec(text, names)
    models = [FreeModel(lambda x: 0.1 * x + torch.linspace(0, 1, x.numel()).reshape(x.shape)) for _ in range(2)]
    pipe = names["Pipeline"](*models, diffusers.DDIMScheduler(clip_sample=False))
    counts = fused.accelerate(pipe).counts
    pipe(torch.ones(1, 4, 2, 2))
    guided = row.fused and form not in ("none", "scale per frame")  # which the step of this DDIM does not take
    assert counts == {"fused with guidance" if guided else "fused without guidance": 2}, (
        "the tracer has changed: change FUSED_FORMS or SEEN_THROUGH in benchmarks/coverage/forms.py"
    )


READ = {  # what cannot be run here; form, calls, changes
    "its own guider": ("pred = self.guider(self.unet(latents, t)[0])[0]", "own guider", "", ()),
    "embedded": ("pred = self.unet(latents, t, guidance=guidance_scale)[0]", "embedded", "", ()),
    "embedded by the timestep's condition": ("pred = self.unet(latents, t, timestep_cond=w)[0]", "embedded", "", ()),
    "a condition that is None": ("w = None; pred = self.unet(latents, t, timestep_cond=w)[0]", "none", "", ()),
    "sample": (
        "u, c = self.unet(x2, t).sample.chunk(2); pred = u + s * (c - u)", U_FORM, BATCH, (),
    ),
    "sample by key": (
        "u, c = self.unet(x2, t)['sample'].chunk(2); pred = u + s * (c - u)", U_FORM, BATCH, (),
    ),
    "another output": (
        "_, p = self.unet(x2, t); u, c = p.chunk(2); pred = u + s * (c - u)", U_FORM, BATCH,
        ("another output before",),
    ),
    "by numpy": (
        "u, c = np.split(self.unet(x2, t)[0], 2); pred = torch.from_numpy(u + s * (c - u))", U_FORM, BATCH,
        ("split before", "from_numpy after"),
    ),
    "one by one": (
        "preds = []\n            for a, b in zip(self.unet(x2, t)[0], self.unet(x2, t)[0]):\n"
        "                preds.append(b + s * (a - b))\n            pred = torch.stack(preds)",
        U_FORM, CALLS, ("one by one before", "shape after"),
    ),
    "one of two models": (
        f"model = self.unet if t > 9 else self.guider; {HALVES.replace('self.unet', 'model')}; pred = u + s * (c - u)",
        U_FORM, BATCH, ("guider is not traced",),
    ),
    "written to": (f"{HALVES}; pred = u + s * (c - u); pred[0] = 0", U_FORM, BATCH, ("written after",)),
    "guidance that is off": (
        f"{HALVES}\n            if guidance_scale <= 1:\n                pred = c\n            else:\n"
        "                pred = u + s * (c - u)", U_FORM, BATCH, (),
    ),
    "a property that says that guidance is on": (
        f"{HALVES}; pred = u + s * (c - u) if self.do_classifier_free_guidance else c.float()", U_FORM, BATCH, (),
    ),
    "what is asked for is given": (
        f"{HALVES}\n            if image is None:\n                raise ValueError\n            else:\n"
        "                pred = u + s * (c - u)", U_FORM, BATCH, (),
    ),
    "what is not asked for is not": (
        f"{HALVES}; pred = u + s * (c - u)\n            if image is not None:\n                pred = -pred",
        U_FORM, BATCH, (),
    ),
    "a branch that ends": (
        f"{HALVES}; pred = u + s * (c - u)\n            if latents.any():\n                pred = -pred\n"
        "                continue", U_FORM, BATCH, (),
    ),
    "one prediction, by either branch": (
        "if t > 9:\n                pred = self.unet(latents, t)[0]\n            else:\n"
        "                pred = self.unet(latents, 0)[0]", "none", "", (),
    ),
    "a function within the method": (
        f"{HALVES}\n            def guide(a, b):\n                return a + s * (b - a)\n"
        "            pred = guide(u, c)",
        U_FORM, BATCH, (),
    ),
    "true CFG that is off by default": (
        "pred = self.unet(latents, t, guidance=s)[0]\n            if true_cfg_scale > 1:\n"
        "                u = self.unet(latents, t, guidance=s)[0]; pred = u + true_cfg_scale * (pred - u)",
        "embedded", "", (),
    ),
    "nothing that was followed": ("pred = latents", "not found", "", ()),
    "something else of two": (f"{HALVES}; pred = torch.where(u > 0, u, c)", "other", "", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_read_of_a_pipeline(name):
    body, form, calls, changes = READ[name]
    found = guidance(body, [("unet, prior,", "unet, prior, guider,")])
    assert (found.form, found.calls, found.changes) == (form, calls, changes)


def test_every_form_is_tested():
    cases = (*READ.values(), *READ_AND_RUN.values())
    assert {form for _, form, *_ in cases} == set(FUSED_FORMS) - {"perturbed attention", "extra passes"}


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("_apply_perturbed_attention_guidance", "perturbed attention"),
        ("do_spatio_temporal_guidance", "extra passes"),
        ("callback", "several conditions"),
    ],
)
def test_three_predictions_are_named_by_the_pipelines_methods(method, form):
    body = f"{HALVES}; p = self.prior(latents, t)[0]; pred = u + s * (c - u) + 3.0 * (c - p)"
    assert guidance(body, [("def predicted", f"def {method}")]).form == form


def test_steps_by_another_method_are_not_fused():
    found = guidance("pred = self.unet(latents, t)[0]", [("scheduler.step(", "scheduler.step_correct(")])
    assert (found.form, found.changes, found.fused) == ("none", ("step_correct, not step",), False)


def test_true_cfg_is_read_where_there_is_no_other_guidance():
    """And where guidance is embedded, it is named as what there is on demand."""
    body = (
        "pred = self.unet(latents, t{embedded})[0]\n            if true_cfg_scale > 1:\n"
        "                u = self.unet(latents, t)[0]; pred = (u + true_cfg_scale * (pred - u))[:, :4]"
    )
    row = row_of(source_with(body.replace("{embedded}", ""))[0], served_names())
    assert (row.form, row.changes, row.on_demand) == (U_FORM, ("slice after",), None)
    row = row_of(source_with(body.replace("{embedded}", ", guidance=s"))[0], served_names())
    assert (row.form, row.fused, row.on_demand.changes) == ("embedded", True, ("slice after",))


def test_rescaling_on_demand_is_told():
    for name in ("rescaled on demand", "rescaled", "one call"):
        row = row_of(source_with(READ_AND_RUN[name][0])[0], served_names())
        assert row.rescales_on_demand == (name == "rescaled on demand")


def test_a_step_of_zeros_guides_nothing():
    """As that of the sound in a pipeline of LTX-2 that makes none."""
    body = f"{HALVES}; self.scheduler.step(torch.zeros_like(latents), t, latents); pred = u + s * (c - u)"
    assert guidance(body).form == U_FORM
