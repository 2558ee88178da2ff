"""Remarks of the libraries that lead a user nowhere, silenced one by one, each by its own words.

Importing this module before diffusers and transformers installs the filters.
"""

import logging

# logger -> the words of the remark
REMARKS = {
    # nothing here uses torchvision
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    # AutoencoderTiny writes a key into its own config that it then calls unexpected
    "diffusers.configuration_utils": "were passed to AutoencoderTiny, but are not expected",
    # the list of modules in question is empty
    "diffusers.models.modeling_utils": "should be kept in float32: []",
    # the embedded base's AutoencoderTiny, which the pipeline takes as well
    "diffusers.pipelines.pipeline_utils": "Expected types for vae",
    # a long prompt is read in parts
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
    # torchao, which diffusers imports where it is installed: kernels for devices that are not here, its own old calls
    "torchao": "Failed to load",
    "torchao.kernel.intmm": "Detected no triton",
    "torch.utils._pytree": "is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    # training needs no content filter, as it shows no picture
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion": "You have disabled the safety checker",
}

for _logger, _words in REMARKS.items():
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in record.getMessage())  # type: ignore[misc]
