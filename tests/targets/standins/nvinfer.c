/* The C functions that TensorRT's Python bindings look for when they are imported. None does anything: it is enough for
   the import, and whatever would call one (a Runtime, a Builder) must not be made. */
#define NOTHING(name) \
    void *name(void) { return 0; }

NOTHING(createInferBuilder_INTERNAL)
NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(getPluginRegistry)
NOTHING(getBuilderPluginRegistry)
NOTHING(initLibNvInferPlugins)
NOTHING(getNvOnnxParserVersion)
