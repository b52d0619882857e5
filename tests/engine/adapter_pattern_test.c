/* The expressions and names of PEFT's configurations: which modules they mean, and how long they
 * may take. */
#include "tests/engine/adapter_case.h"

static void scales_follow_patterns_as_peft_reads_them(void **state)
{
    (void)state;
    static const struct {
        const char *settings;
        float first, second; /* of layers 0 and 1 */
    } cases[] = {
        {"\"lora_alpha\": 6", 3, 3},
        {"\"lora_alpha\": 6, \"use_rslora\": true", 4.24264069F, 4.24264069F},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"o_proj\": 1}", 0.5F, 0.5F},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"_proj\": 1}", 3, 3},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"layers.1.self_attn.o_proj\": 1}", 3, 0.5F},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"layers?1.self_attn.o_proj\": 1}", 3, 3},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"layers\\\\.[1-9].*\\\\.o_proj\": 1}", 3, 0.5F},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\".*layers.0.*\": 2, \"o_proj\": 1}", 1, 0.5F},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"model.layers.0.self_attn.o_proj\": 4}", 2, 3},
        {"\"lora_alpha\": 6, \"alpha_pattern\": {\"layers.1|layers.0\": 4}", 3, 3},
        {"\"lora_alpha\": 6.5, \"rank_pattern\": null, \"alpha_pattern\": {}", 3.25F, 3.25F},
    };
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    add_lora(&image, LAYERS "1.self_attn.o_proj", 2, 64, 64);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char config[256];
        snprintf(config, sizeof config, "{\"peft_type\": \"LORA\", \"r\": 2, %s}",
                 cases[i].settings);
        choir_adapter_data *d = reads("llama", config, &image);
        if (find_change(d, CHOIR_ROLE_ATTN_OUT, 0, 0)->scale != cases[i].first ||
            find_change(d, CHOIR_ROLE_ATTN_OUT, 1, 0)->scale != cases[i].second)
            fail_msg("%s: %g, %g", config, (double)d->changes[0].scale,
                     (double)d->changes[1].scale);
        choir_adapter_data_free(d);
    }
    image_free(&image);
}

static void ranks_follow_patterns(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 5, 64, 64);
    add_lora(&image, LAYERS "1.self_attn.o_proj", 2, 64, 64);
    const char *config = "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 5, "
                         "\"rank_pattern\": {\"layers\\\\.0\\\\..*\": 5}}";
    choir_adapter_data *d = reads("llama", config, &image);
    assert_int_equal(find_change(d, CHOIR_ROLE_ATTN_OUT, 0, 0)->rank, 5);
    assert_true(find_change(d, CHOIR_ROLE_ATTN_OUT, 0, 0)->scale == 1);
    assert_int_equal(d->max_rank, 5);
    choir_adapter_data_free(d);
    image_free(&image);
}

static void patterns_that_are_none_or_never_end_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *pattern;
        choir_status status;
        const char *word;
    } bad[] = {
        {"\"rank_pattern\": {\"(\": 2}", CHOIR_E_FORMAT, "no regular expression"},
        {"\"rank_pattern\": {\"q{,3}\": 2}", CHOIR_E_UNIMPLEMENTED, "{,"},
        {"\"rank_pattern\": {\"o_proj\": \"2\"}", CHOIR_E_FORMAT, "no number for \"o_proj\""},
        {"\"rank_pattern\": [\"o_proj\"]", CHOIR_E_FORMAT, "rank_pattern"},
        {"\"alpha_pattern\": {\"((a|[a-z._0-9]|[a-z_.0-9])*)*[A-Z]\": 2}", CHOIR_E_INVALID,
         "steps"},
        {"\"rank_pattern\": {\"o_proj\": 0}", CHOIR_E_INVALID, "r is 0"},
        {"\"rank_pattern\": {\"o_proj\": 1e9}", CHOIR_E_INVALID, "r is 1e+09"},
        {"\"rank_pattern\": {\"o_proj\": 3}", CHOIR_E_INVALID, "[3, 64]"},
        {"\"alpha_pattern\": {\"o_proj\": 1e300}", CHOIR_E_INVALID, "lora_alpha is 1e+300"},
    };
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char config[256];
        snprintf(config, sizeof config,
                 "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, %s}", bad[i].pattern);
        refuses("llama", config, &image, bad[i].status, bad[i].word);
    }
    image_free(&image);
}

/* Each may take its steps, all together may not. */
static void patterns_that_take_long_together_are_refused(void **state)
{
    (void)state;
    enum { KEYS = 10000, ROOM = KEYS * 64 };
    adapter_image image = {0};
    choir_adapter_data *data;
    char *config = malloc(ROOM);
    assert_non_null(config);
    int n = snprintf(config, ROOM,
                     "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, \"rank_pattern\": {");
    for (int i = 0; i < KEYS; i++)
        n += snprintf(config + n, (size_t)(ROOM - n), "%s\".*[a-z].*[a-z].*[a-z](%d|Q)\": 3",
                      i > 0 ? ", " : "", i);
    snprintf(config + n, (size_t)(ROOM - n), "}}");
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    image_safetensors(&image);
    says(check_header(base_of("llama"), config, &image, &data), CHOIR_E_INVALID,
         "the 10000 keys of rank_pattern take too long");
    free(config);
    image_free(&image);
}

/* A configuration speaks of modules as the model that was trained has them. */
static void patterns_are_compared_with_the_whole_names_of_those_models(void **state)
{
    (void)state;
    static const struct {
        const char *pattern;
        float scale;
    } cases[] = {
        {"model.language_model.layers.0.self_attn.o_proj", 5},
        {"language_model.layers.0.self_attn.o_proj", 5},
        {"layers.0.self_attn.o_proj", 5},
        {".*language_model.*o_proj", 5},
        {"model.layers.0.self_attn.o_proj", 3}, /* such a module there is not */
    };
    adapter_image image = {0};
    add_lora(&image, "base_model.model.model.language_model.layers.0.self_attn.o_proj", 2, 64, 64);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char config[256];
        snprintf(config, sizeof config,
                 "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"alpha_pattern\": "
                 "{\"%s\": 10}}",
                 cases[i].pattern);
        choir_adapter_data *d = reads("llama", config, &image);
        if (d->changes[0].scale != cases[i].scale)
            fail_msg("%s: %g", config, (double)d->changes[0].scale);
        choir_adapter_data_free(d);
    }
    image_free(&image);
    /* The same of the names in lists. */
    image_add(&image, "base_model.model.model.language_model.norm.weight", 64, 0, 0);
    choir_adapter_data *d = reads("llama",
                                  "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, "
                                  "\"modules_to_save\": [\"model.language_model.norm\"]}",
                                  &image);
    assert_int_equal(d->changes[0].role, CHOIR_ROLE_OUTPUT_NORM);
    choir_adapter_data_free(d);
    image_free(&image);
    image_add(&image, "base_model.model.language_model.model.layers.0.self_attn.o_proj.ia3_l", 1,
              64, 0);
    d = reads("llama",
              "{\"peft_type\": \"IA3\", \"feedforward_modules\": "
              "\"language_model\\\\.model\\\\.layers.*o_proj\"}",
              &image);
    assert_int_equal(d->changes[0].has, CHOIR_ADAPTER_HAS_IN_SCALE);
    choir_adapter_data_free(d);
    image_free(&image);
}

static int tear_down(void **state)
{
    (void)state;
    close_bases();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scales_follow_patterns_as_peft_reads_them),
        cmocka_unit_test(ranks_follow_patterns),
        cmocka_unit_test(patterns_that_are_none_or_never_end_are_refused),
        cmocka_unit_test(patterns_that_take_long_together_are_refused),
        cmocka_unit_test(patterns_are_compared_with_the_whole_names_of_those_models),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}
