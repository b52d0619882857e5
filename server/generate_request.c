#include "server/generate_request.h"

#include "engine/chat_variables.h"
#include "server/message.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum {
    MAX_MESSAGES = 4096,
    MAX_IDS = 1 << 20,
    MAX_PRIORITY = 1000000,
    NAME_BYTES = 256,
    PATH_BYTES = 1024,
    MAX_STOP_IDS = 48
}; /* with a model's own 16 they fill the sampler's 64 */

// clang-format off
#define RULE(type, field, count, bytes) {&choir__v1__##type##__descriptor, field, count, bytes}
const choir_wire_rule choir_request_rules[] = {
    RULE(generate_request, "request_id", 0, 128),
    RULE(generate_request, "model", 0, NAME_BYTES),
    RULE(generate_request, "adapter", 0, NAME_BYTES),
    RULE(generate_request, "mix", CHOIR_MAX_MIX, 0),
    RULE(generate_request, "ensemble", 0, NAME_BYTES),
    RULE(adapter_weight, "adapter", 0, NAME_BYTES),
    RULE(token_list, "ids", MAX_IDS, 0),
    RULE(chat, "messages", MAX_MESSAGES, 0),
    RULE(chat, "tools_json", 0, 256 << 10),
    RULE(chat, "variables_json", 0, 64 << 10),
    RULE(chat_message, "role", 0, 64),
    RULE(sampling, "stop", CHOIR_MAX_STOPS, CHOIR_MAX_STOP_BYTES),
    RULE(sampling, "stop_token_ids", MAX_STOP_IDS, 0),
    RULE(sampling, "logit_bias", CHOIR_MAX_LOGIT_BIAS, 0),
    RULE(tokenize_request, "model", 0, NAME_BYTES),
    RULE(detokenize_request, "model", 0, NAME_BYTES),
    RULE(detokenize_request, "ids", MAX_IDS, 0),
    RULE(get_stats_request, "model", 0, NAME_BYTES),
    RULE(load_adapter_request, "name", 0, NAME_BYTES),
    RULE(load_adapter_request, "path", 0, PATH_BYTES),
    RULE(load_adapter_request, "model", 0, NAME_BYTES),
    RULE(unload_adapter_request, "name", 0, NAME_BYTES),
    RULE(unload_adapter_request, "model", 0, NAME_BYTES),
    RULE(list_adapters_request, "model", 0, NAME_BYTES),
    RULE(list_adapters_request, "after", 0, NAME_BYTES),
};
#undef RULE
// clang-format on
const size_t choir_n_request_rules = sizeof choir_request_rules / sizeof *choir_request_rules;

choir_status choir_generate_request_read(const uint8_t *data, size_t bytes,
                                         choir_generate_request *out)
{
    *out = (choir_generate_request){0};
    ProtobufCMessage *message;
    CHOIR_TRY(choir_message_read(&choir__v1__generate_request__descriptor, choir_request_rules,
                                 choir_n_request_rules, data, bytes, &message));
    out->message = (Choir__V1__GenerateRequest *)message;
    snprintf(out->id, sizeof out->id, "%s", out->message->request_id);
    return CHOIR_OK;
}

void choir_generate_request_free(choir_generate_request *r)
{
    choir_message_free((ProtobufCMessage *)r->message);
    choir_free(r->tokens);
    choir_free(r->logit_bias);
    *r = (choir_generate_request){0};
}

static choir_status no_memory(void)
{
    return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a request");
}

/* --- the prompt */

static choir_status put(json_t *object, const char *key, json_t *value)
{
    return json_object_set_new(object, key, value) == 0 ? CHOIR_OK : no_memory();
}

static choir_status put_messages(json_t *variables, const Choir__V1__Chat *chat)
{
    if (chat->n_messages == 0)
        return choir_fail(CHOIR_E_INVALID, "chat.messages is empty; a chat has 1 to %d messages",
                          MAX_MESSAGES);
    json_t *list = json_array();
    CHOIR_TRY(put(variables, "messages", list));
    for (size_t i = 0; i < chat->n_messages; i++) {
        const Choir__V1__ChatMessage *m = chat->messages[i];
        if (m->role[0] == '\0')
            return choir_fail(CHOIR_E_INVALID, "chat.messages[%zu].role is empty", i);
        json_t *message = json_object();
        if (json_array_append_new(list, message) != 0) return no_memory();
        CHOIR_TRY(put(message, "role", json_string(m->role)));
        CHOIR_TRY(put(message, "content", json_string(m->content)));
    }
    return CHOIR_OK;
}

static choir_status parse_json(const char *field, const char *text, bool array, json_t **out)
{
    json_error_t error;
    json_t *value = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (value == NULL)
        return choir_fail(CHOIR_E_INVALID, "chat.%s is no JSON: %s at byte %d", field, error.text,
                          error.position);
    if (array ? json_is_array(value) : json_is_object(value)) {
        *out = value;
        return CHOIR_OK;
    }
    json_decref(value);
    return choir_fail(CHOIR_E_INVALID, "chat.%s is no JSON %s", field, array ? "array" : "object");
}

/* The client's own variables first: they cannot replace what the server sets. */
static choir_status fill_variables(const choir_server_model *model, const Choir__V1__Chat *chat,
                                   json_t *variables)
{
    if (chat->variables_json[0] != '\0') {
        json_t *own;
        CHOIR_TRY(parse_json("variables_json", chat->variables_json, false, &own));
        int updated = json_object_update(variables, own);
        json_decref(own);
        if (updated != 0) return no_memory();
    }
    if (chat->tools_json[0] != '\0') {
        json_t *tools;
        CHOIR_TRY(parse_json("tools_json", chat->tools_json, true, &tools));
        CHOIR_TRY(put(variables, "tools", tools));
    }
    bool open_turn = chat->_add_generation_prompt_case == 0 || chat->add_generation_prompt;
    CHOIR_TRY(choir_chat_variables_set(variables, model->tokenizer, open_turn));
    return put_messages(variables, chat);
}

choir_status choir_chat_render(const choir_server_model *model, const Choir__V1__Chat *chat,
                               char **text, size_t *bytes)
{
    if (model->chat_template == NULL)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "model %s has no chat template; send `prompt` or `tokens`", model->name);
    json_t *variables = json_object();
    if (variables == NULL) return no_memory();
    choir_status status = fill_variables(model, chat, variables);
    if (status == CHOIR_OK) {
        status = choir_chat_template_render(model->chat_template, variables, (int64_t)time(NULL),
                                            text, bytes);
        if (status == CHOIR_E_FULL) status = CHOIR_E_INVALID; /* its limits are not load */
        if (status == CHOIR_E_INVALID) status = choir_fail_in(status, "chat");
    }
    json_decref(variables);
    return status;
}

static choir_status encode(choir_generate_request *r, const char *text, size_t bytes,
                           bool add_special)
{
    choir_encode_options options = CHOIR_ENCODE_OPTIONS_DEFAULT;
    options.add_special = add_special;
    CHOIR_TRY(choir_tokenizer_encode(r->model->tokenizer, text, bytes, options, &r->tokens,
                                     &r->request.n_tokens));
    r->request.tokens = r->tokens;
    return CHOIR_OK;
}

static choir_status encode_chat(choir_generate_request *r)
{
    char *text;
    size_t bytes;
    CHOIR_TRY(choir_chat_render(r->model, r->message->chat, &text, &bytes));
    choir_status status = encode(r, text, bytes, false); /* the template writes BOS itself */
    choir_free(text);
    return status;
}

static choir_status take_ids(choir_generate_request *r)
{
    const Choir__V1__TokenList *list = r->message->tokens;
    uint32_t vocab = r->model->config->vocab;
    for (size_t i = 0; i < list->n_ids; i++)
        if (list->ids[i] >= vocab)
            return choir_fail(CHOIR_E_INVALID, "tokens.ids[%zu] is %u; the vocabulary ends at %u",
                              i, list->ids[i], vocab - 1);
    r->request.tokens = list->ids;
    r->request.n_tokens = list->n_ids;
    return CHOIR_OK;
}

uint32_t choir_server_model_max_tokens(const choir_server_model *model)
{
    return model->max_tokens != 0 ? model->max_tokens : model->config->max_positions;
}

static choir_status resolve_prompt(choir_generate_request *r)
{
    const Choir__V1__GenerateRequest *m = r->message;
    const char *what = "prompt";
    switch (m->input_case) {
    case CHOIR__V1__GENERATE_REQUEST__INPUT_PROMPT:
        CHOIR_TRY(encode(r, m->prompt, strlen(m->prompt), true));
        break;
    case CHOIR__V1__GENERATE_REQUEST__INPUT_CHAT:
        what = "chat";
        CHOIR_TRY(encode_chat(r));
        break;
    case CHOIR__V1__GENERATE_REQUEST__INPUT_TOKENS:
        what = "tokens.ids";
        CHOIR_TRY(take_ids(r));
        break;
    default:
        return choir_fail(CHOIR_E_INVALID,
                          "the request has none of prompt, tokens and chat: one is due");
    }
    if (r->request.n_tokens == 0)
        return choir_fail(CHOIR_E_INVALID, "%s gives no tokens; a prompt has at least 1", what);
    uint32_t limit = choir_server_model_max_tokens(r->model);
    if (r->request.n_tokens >= limit)
        return choir_fail(
            CHOIR_E_INVALID,
            "%s has %zu tokens; the context of %s holds %u, of which at least 1 is for "
            "the answer",
            what, r->request.n_tokens, r->model->name, limit);
    return CHOIR_OK;
}

/* --- sampling */

static choir_status draw_seed(uint64_t *seed)
{
    if (getrandom(seed, sizeof *seed, 0) == (ssize_t)sizeof *seed) return CHOIR_OK;
    return choir_fail(CHOIR_E_INTERNAL, "getrandom: %m");
}

static choir_status resolve_bias(choir_generate_request *r, const Choir__V1__Sampling *s)
{
    if (s->n_logit_bias == 0) return CHOIR_OK;
    r->logit_bias = choir_calloc(CHOIR_MEM_REQUESTS, s->n_logit_bias, sizeof *r->logit_bias);
    if (r->logit_bias == NULL) return no_memory();
    for (size_t i = 0; i < s->n_logit_bias; i++)
        r->logit_bias[i] = (choir_logit_bias){s->logit_bias[i]->key, s->logit_bias[i]->value};
    r->request.sampling.logit_bias = r->logit_bias;
    r->request.sampling.n_logit_bias = (uint32_t)s->n_logit_bias;
    return CHOIR_OK;
}

#define TAKE(field, into)                                                                          \
    if (s->_##field##_case != 0) (into) = s->field

/* What the sampler bounds itself (choir_sampling_check) is only copied here. */
static choir_status resolve_sampling(choir_generate_request *r)
{
    static const Choir__V1__Sampling none = CHOIR__V1__SAMPLING__INIT;
    const Choir__V1__Sampling *s = r->message->sampling != NULL ? r->message->sampling : &none;
    choir_request *q = &r->request;
    choir_sampling *to = &q->sampling;
    *to = choir_sampling_of_model(r->model->config);
    TAKE(temperature, to->temperature);
    TAKE(top_k, to->top_k);
    TAKE(top_p, to->top_p);
    TAKE(min_p, to->min_p);
    TAKE(repetition_penalty, to->repetition_penalty);
    TAKE(presence_penalty, to->presence_penalty);
    TAKE(frequency_penalty, to->frequency_penalty);
    TAKE(min_tokens, to->min_tokens);
    TAKE(logprobs, to->top_logprobs);
    if (s->_seed_case != 0)
        to->seed = s->seed;
    else
        CHOIR_TRY(draw_seed(&to->seed));
    q->want_logprobs = s->_logprobs_case != 0;
    q->n = 1;
    TAKE(n, q->n);
    TAKE(max_tokens, q->max_tokens);
    TAKE(ignore_eos, q->ignore_eos);
    q->skip_special = true;
    TAKE(skip_special_tokens, q->skip_special);
    q->stops = (const char *const *)s->stop;
    q->n_stops = (uint32_t)s->n_stop;
    q->stop_ids = s->stop_token_ids;
    q->n_stop_ids = (uint32_t)s->n_stop_token_ids;
    return resolve_bias(r, s);
}

static choir_status check_sampling(const choir_generate_request *r)
{
    const Choir__V1__Sampling *s = r->message->sampling;
    const choir_request *q = &r->request;
    uint32_t vocab = r->model->config->vocab, room = choir_server_model_max_tokens(r->model);
    if (q->n < 1 || q->n > CHOIR_MAX_SAMPLES)
        return choir_fail(CHOIR_E_INVALID, "sampling.n is %u; it is 1 to %d", q->n,
                          CHOIR_MAX_SAMPLES);
    if (s != NULL && s->_max_tokens_case != 0 && s->max_tokens == 0)
        return choir_fail(CHOIR_E_INVALID, "sampling.max_tokens is 0; it is at least 1");
    uint32_t most = q->max_tokens != 0 ? q->max_tokens : room;
    if (q->sampling.min_tokens > most)
        return choir_fail(CHOIR_E_INVALID, "sampling.min_tokens is %u; max_tokens is %u",
                          q->sampling.min_tokens, most);
    for (uint32_t i = 0; i < q->n_stops; i++)
        if (q->stops[i][0] == '\0')
            return choir_fail(CHOIR_E_INVALID, "sampling.stop[%u] is empty; it has 1 to %d bytes",
                              i, CHOIR_MAX_STOP_BYTES);
    for (uint32_t i = 0; i < q->n_stop_ids; i++)
        if (q->stop_ids[i] >= vocab)
            return choir_fail(CHOIR_E_INVALID,
                              "sampling.stop_token_ids[%u] is %u; the vocabulary ends at %u", i,
                              q->stop_ids[i], vocab - 1);
    choir_status status = choir_sampling_check(&q->sampling, vocab);
    return status == CHOIR_OK ? CHOIR_OK : choir_fail(status, "sampling.%s", choir_error_message());
}

/* --- adapters */

static choir_status take_mix(choir_generate_request *r)
{
    const Choir__V1__GenerateRequest *m = r->message;
    for (size_t i = 0; i < m->n_mix; i++) {
        const Choir__V1__AdapterWeight *one = m->mix[i];
        if (one->adapter[0] == '\0')
            return choir_fail(CHOIR_E_INVALID, "mix[%zu].adapter is empty; it has 1 to %d bytes", i,
                              NAME_BYTES);
        if (!(fabsf(one->weight) <= CHOIR_MAX_ADAPTER_WEIGHT)) /* NaN is not */
            return choir_fail(CHOIR_E_INVALID, "mix[%zu].weight is %g; it is -%d to %d", i,
                              (double)one->weight, CHOIR_MAX_ADAPTER_WEIGHT, CHOIR_MAX_ADAPTER_WEIGHT);
        for (size_t k = 0; k < i; k++)
            if (strcmp(m->mix[k]->adapter, one->adapter) == 0)
                return choir_fail(CHOIR_E_INVALID,
                                  "mix[%zu].adapter is \"%s\" as mix[%zu] has it; each is named once", i,
                                  one->adapter, k);
        r->adapters[i] = (choir_request_adapter){one->adapter, one->weight};
    }
    r->request.n_adapters = (uint32_t)m->n_mix;
    return CHOIR_OK;
}

static choir_status resolve_adapters(choir_generate_request *r)
{
    const Choir__V1__GenerateRequest *m = r->message;
    bool one = m->adapting_case == CHOIR__V1__GENERATE_REQUEST__ADAPTING_ADAPTER &&
               m->adapter[0] != '\0';
    bool by_itself = m->adapting_case == CHOIR__V1__GENERATE_REQUEST__ADAPTING_AUTO_ADAPTER &&
                     m->auto_adapter;
    if ((one || by_itself) && m->n_mix != 0)
        return choir_fail(CHOIR_E_INVALID,
                          "at most one of adapter, auto_adapter and mix may be set");
    if (by_itself)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "auto_adapter: the router does not choose adapters yet; name one in "
                          "adapter, or leave it out");
    if (!one && m->n_mix == 0) return CHOIR_OK;
    r->request.adapters = r->adapters;
    if (!one) return take_mix(r);
    r->adapters[0] = (choir_request_adapter){m->adapter, 1};
    r->request.n_adapters = 1;
    return CHOIR_OK;
}

/* --- what is not there yet */

static choir_status check_capabilities(const choir_generate_request *r)
{
    const Choir__V1__GenerateRequest *m = r->message;
    if (m->ensemble[0] != '\0')
        return choir_fail(CHOIR_E_PRECONDITION,
                          "ensemble: Mixture-of-Agents is not there yet; leave it out");
    if (m->routing != NULL && m->routing->router_version != 0)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "routing.router_version is %" PRIu64
                          ": router versions are not there yet; leave it out or send 0",
                          m->routing->router_version);
    if (m->routing != NULL && m->routing->return_routes && r->model->config->n_experts == 0)
        return choir_fail(CHOIR_E_PRECONDITION,
                          "routing.return_routes: model %s is dense, it has no routes",
                          r->model->name);
    if (m->priority < -MAX_PRIORITY || m->priority > MAX_PRIORITY)
        return choir_fail(CHOIR_E_INVALID, "priority is %d; it is %d to %d", m->priority,
                          -MAX_PRIORITY, MAX_PRIORITY);
    return CHOIR_OK;
}

choir_status choir_generate_request_resolve(choir_generate_request *r,
                                            const choir_server_model *model)
{
    const Choir__V1__GenerateRequest *m = r->message;
    r->model = model;
    CHOIR_TRY(check_capabilities(r));
    CHOIR_TRY(resolve_adapters(r));
    CHOIR_TRY(resolve_sampling(r));
    CHOIR_TRY(check_sampling(r));
    CHOIR_TRY(resolve_prompt(r));
    r->return_routes = m->routing != NULL && m->routing->return_routes;
    r->request.want_routes = r->return_routes;
    r->request.priority = m->priority;
    return CHOIR_OK;
}
