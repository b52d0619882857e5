/* A chat template, then a zero byte and the variables as JSON (without them, a conversation of our
 * own): any bytes compile or not, render or not, and end in a sentence if not. */
#include "base/base.h"
#include "engine/chat_template.h"
#include <string.h>

static const char conversation[] =
    "{\"messages\":[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\"é🌍 "
    "x\"},"
    "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"abcdefghi\",\"type\":"
    "\"function\",\"function\":{\"name\":\"f\",\"arguments\":{\"a\":[1,-2.5,true]}}}]},"
    "{\"role\":\"tool\",\"content\":\"r\"}],\"tools\":[{\"type\":\"function\",\"function\":{"
    "\"name\":"
    "\"f\",\"description\":\"d\",\"parameters\":{\"type\":\"object\",\"properties\":{\"a\":{"
    "\"type\":"
    "[\"array\",\"null\"],\"items\":{\"type\":\"string\"}}},\"required\":[\"a\"]}}}],"
    "\"add_generation_prompt\":true,\"bos_token\":\"<s>\",\"eos_token\":\"</"
    "s>\",\"n\":7,\"f\":-0.5,"
    "\"s\":\"Hello, World\",\"l\":[3,1,2],\"d\":{\"b\":1,\"a\":[]},\"e\":\"\"}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const char *source = (const char *)data, *zero = bytes > 0 ? memchr(data, 0, bytes) : NULL;
    size_t n = zero != NULL ? (size_t)(zero - source) : bytes, text_bytes;
    choir_chat_template *t = NULL;
    char *text = NULL;
    json_t *variables =
        zero != NULL ? json_loadb(zero + 1, bytes - n - 1, JSON_ALLOW_NUL, NULL) : NULL;
    if (!json_is_object(variables)) {
        json_decref(variables);
        variables = json_loads(conversation, 0, NULL);
    }
    choir_status status = choir_chat_template_compile(source, n, &t);
    if (status == CHOIR_OK)
        status = choir_chat_template_render(t, variables, 1753963267, &text, &text_bytes);
    CHOIR_ASSERT(status == CHOIR_OK || choir_error_message()[0] != 0);
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL);
    choir_free(text);
    choir_chat_template_destroy(t);
    json_decref(variables);
    return 0;
}
