"""Entry point `lmms_eval.models`: what lmms-eval reads at start-up. Nothing heavy, or a fault here hides other plug-ins."""


def manifest():
    """Registers the model as `aimv2_vlm`; torch and transformers load only when the model is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="aimv2_vlm", simple_class_path="aimv2_vlm.evaluation.lmms_model.AssistantModel"
    )
