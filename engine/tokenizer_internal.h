/* WHAT    The tokenizer's rooms as they see each other: vocabulary, BPE, patterns, the steps from
 *         text to pieces, the stages from tokens to text.
 * OWNS    choir_tokenizer owns all of it; scratch belongs to one call of encode.
 * THREADS Read-only after it is built, but for the word cache (atomics of its own).
 * ERRORS  As engine/tokenizer.h says.
 * LIMITS  Included by engine/tokenizer*.c only.
 * NEXT    engine/tokenizer.c, which reads aloud. */
#pragma once
#include "engine/tokenizer.h"
#include "engine/tokenizer_buffer.h"
#include "engine/tokenizer_pattern.h"
#include "engine/tokenizer_unicode.h"

/* ---- vocabulary: id <-> piece */
#define CHOIR_NO_ID UINT32_MAX
typedef enum choir_id_flag {
    CHOIR_ID_SPECIAL = 1, /* an added token that is special */
    CHOIR_ID_SKIPPED = 2, /* left out by decode with skip_special */
    CHOIR_ID_NORMAL = 4,  /* decoded as its normalised content: see choir_added_token */
} choir_id_flag;
typedef struct choir_vocab {
    choir_bytes text; /* all pieces, one behind the other, a NUL behind each */
    uint32_t *offset; /* [n_ids] into text */
    uint32_t *length; /* [n_ids]; CHOIR_NO_ID for a hole */
    uint8_t *flags;   /* [n_ids] choir_id_flag */
    uint32_t n_ids, capacity;
    uint32_t n_pieces;
    uint32_t longest; /* bytes of the longest piece */
    uint32_t *slots;  /* open addressing by hash of the piece: id, or CHOIR_NO_ID */
    uint32_t mask;
} choir_vocab;

choir_status choir_vocab_create(choir_vocab *vocab, uint32_t n_ids, size_t text_bytes,
                                size_t n_pieces) CHOIR_MUST_USE;
void choir_vocab_destroy(choir_vocab *vocab);
/* CHOIR_E_FORMAT if the id has a piece already. A piece that is there already keeps its first id.
 */
choir_status choir_vocab_add(choir_vocab *vocab, uint32_t id, const char *piece,
                             size_t bytes) CHOIR_MUST_USE;
uint32_t choir_vocab_find(const choir_vocab *vocab, const char *piece, size_t bytes);
static inline bool choir_vocab_has(const choir_vocab *vocab, uint32_t id)
{
    return id < vocab->n_ids && vocab->length[id] != CHOIR_NO_ID;
}

/* ---- the model: byte pair encoding by merge ranks, or by scores as SentencePiece does */
typedef struct choir_merge {
    uint32_t left, right; /* ids */
    uint32_t rank;        /* lower is merged first */
    uint32_t id;          /* what they become; CHOIR_NO_ID: a free slot */
} choir_merge;

typedef struct choir_word_cache choir_word_cache;

/* SentencePiece: whether a piece may come out of a merge; an unused one may, and is split again. */
typedef enum choir_mergeable {
    CHOIR_MERGEABLE,
    CHOIR_MERGEABLE_UNUSED,
    CHOIR_MERGEABLE_NEVER
} choir_mergeable;

typedef struct choir_bpe {
    choir_merge *merges; /* open addressing by (left, right) */
    uint32_t mask;
    uint32_t byte_id[256];     /* the id of each byte written as GPT-2 writes it */
    uint32_t fallback_id[256]; /* <0x00> … <0xFF> */
    bool all_bytes;            /* every byte_id is there: words stay raw bytes */
    bool byte_fallback, fuse_unknown, ignore_merges;
    uint32_t unknown_id;  /* CHOIR_NO_ID: unknown characters vanish */
    uint32_t *score_rank; /* [n_ids], SentencePiece only: order of the scores, best first */
    uint8_t *mergeable;   /* [n_ids], SentencePiece only: choir_mergeable */
    choir_word_cache *cache;
} choir_bpe;

choir_status choir_bpe_create(choir_bpe *bpe, const choir_vocab *vocab,
                              size_t n_merges) CHOIR_MUST_USE;
void choir_bpe_destroy(choir_bpe *bpe);
/* Merge number `rank`: both parts and their joint must be in the vocabulary. */
choir_status choir_bpe_add_merge(choir_bpe *bpe, const choir_vocab *vocab, uint32_t rank,
                                 const char *left, size_t left_bytes, const char *right,
                                 size_t right_bytes) CHOIR_MUST_USE;

/* One symbol of a word that is being merged; the list is threaded through an array. */
typedef struct choir_symbol {
    uint32_t id;         /* CHOIR_NO_ID: not in the vocabulary (SentencePiece) */
    uint32_t begin, end; /* bytes of the word; end == begin: merged away */
    int32_t previous, next;
} choir_symbol;

typedef struct choir_candidate {
    uint32_t rank, at, id, bytes;
} choir_candidate;

typedef struct choir_bpe_scratch {
    choir_symbol *symbols;
    size_t symbol_capacity;
    choir_candidate *heap;
    size_t heap_capacity;
    size_t n_heap;
    uint32_t *unused_left; /* [n_ids]: how an unused piece was made, for splitting it again */
    choir_bytes mapped;
} choir_bpe_scratch;
void choir_bpe_scratch_free(choir_bpe_scratch *scratch);

/* Appends the ids of one word. raw_bytes: the word is bytes, the vocabulary writes them as
 * characters. */
choir_status choir_bpe_encode(const choir_bpe *bpe, const choir_vocab *vocab, const char *word,
                              size_t bytes, bool raw_bytes, choir_bpe_scratch *scratch,
                              choir_ids *out) CHOIR_MUST_USE;

/* ---- words seen before, by their bytes */
choir_status choir_word_cache_create(choir_word_cache **out) CHOIR_MUST_USE;
void choir_word_cache_destroy(choir_word_cache *cache);
enum { CHOIR_CACHED_WORD_BYTES = 24, CHOIR_CACHED_WORD_IDS = 8 };
/* The number of ids put into `ids` (room for CHOIR_CACHED_WORD_IDS), 0 when the word is not there.
 */
size_t choir_word_cache_get(const choir_word_cache *cache, const char *word, size_t bytes,
                            uint32_t *ids);
void choir_word_cache_put(choir_word_cache *cache, const char *word, size_t bytes,
                          const uint32_t *ids, size_t n_ids);

/* What steps may make of a text: a hostile file could otherwise double it again and again. */
static inline size_t choir_text_limit(size_t bytes)
{
    return bytes * 64 + 65536;
}
choir_status choir_text_too_long(size_t bytes); /* fails */

/* ---- normalizers */
typedef enum choir_normal_kind {
    CHOIR_NORMAL_NFC,
    CHOIR_NORMAL_NFD,
    CHOIR_NORMAL_NFKC,
    CHOIR_NORMAL_NFKD,
    CHOIR_NORMAL_LOWERCASE,
    CHOIR_NORMAL_STRIP,
    CHOIR_NORMAL_STRIP_ACCENTS,
    CHOIR_NORMAL_PREPEND,
    CHOIR_NORMAL_REPLACE,
    CHOIR_NORMAL_BYTE_LEVEL,
    CHOIR_NORMAL_NMT,
    CHOIR_NORMAL_COLLAPSE_SPACES, /* SentencePiece's remove_extra_whitespaces */
} choir_normal_kind;

typedef struct choir_normal_step {
    choir_normal_kind kind;
    bool left, right;       /* STRIP */
    choir_pattern *pattern; /* REPLACE */
    char *content;          /* REPLACE, PREPEND; choir_free()d */
    size_t content_bytes;
} choir_normal_step;

/* Runs all steps over `text`; the result is in *out, which points into `text` or into one of
 * `buffers`. */
choir_status choir_normalize(const choir_normal_step *steps, size_t n_steps, const char *text,
                             size_t bytes, choir_bytes buffers[2], choir_match *match,
                             const char **out, size_t *out_bytes) CHOIR_MUST_USE;

/* ---- pre-tokenizers */
typedef enum choir_split_behaviour {
    CHOIR_SPLIT_ISOLATED,
    CHOIR_SPLIT_REMOVED,
    CHOIR_SPLIT_MERGED_WITH_PREVIOUS,
    CHOIR_SPLIT_MERGED_WITH_NEXT,
    CHOIR_SPLIT_CONTIGUOUS,
} choir_split_behaviour;

typedef enum choir_split_kind {
    CHOIR_SPLIT_PATTERN,
    CHOIR_SPLIT_NUMERIC, /* by character class */
    CHOIR_SPLIT_PUNCTUATION,
    CHOIR_SPLIT_SPACE,
    CHOIR_SPLIT_CHARACTER,    /* one given character */
    CHOIR_SPLIT_PREFIX_SPACE, /* a space before pieces that start with none */
    CHOIR_SPLIT_BYTES,        /* bytes written as characters */
    CHOIR_SPLIT_METASPACE,    /* spaces to a mark, the mark before pieces that start with none */
    CHOIR_SPLIT_FIXED,        /* every `length` characters */
} choir_split_kind;

typedef enum choir_prepend {
    CHOIR_PREPEND_ALWAYS,
    CHOIR_PREPEND_FIRST,
    CHOIR_PREPEND_NEVER
} choir_prepend;

typedef struct choir_split_step {
    choir_split_kind kind;
    choir_split_behaviour behaviour;
    bool invert;
    choir_prepend prepend;
    uint32_t character; /* CHARACTER, METASPACE's mark */
    uint32_t length;    /* FIXED */
    choir_pattern *pattern;
} choir_split_step;

/* Text with its pieces, and what the next step writes into. */
typedef struct choir_split_scratch {
    choir_bytes buffers[2];
    choir_pieces pieces[2];
} choir_split_scratch;

/* Cuts `text` into *out over *out_text. `first`: the text starts where the caller's does. */
choir_status choir_split(const choir_split_step *steps, size_t n_steps, const char *text,
                         size_t bytes, bool first, choir_split_scratch *scratch, choir_match *match,
                         const char **out_text, const choir_pieces **out) CHOIR_MUST_USE;

/* ---- added tokens: found in the text before anything else */
typedef struct choir_added_token {
    uint32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
    char *normal; /* its content normalised, where that differs; what is decoded and matched then */
    size_t normal_bytes;
} choir_added_token;

typedef struct choir_added_node {
    uint32_t first_child, next_sibling; /* 0: none */
    uint32_t token;                     /* index, CHOIR_NO_ID: none ends here */
    uint8_t byte;
} choir_added_node;

/* A trie over bytes; root is node 0. */
typedef struct choir_added_trie {
    choir_added_node *nodes;
    size_t n, capacity;
    uint32_t root[256]; /* the root's children by byte, 0: none */
    bool any;
} choir_added_trie;

choir_status choir_added_insert(choir_added_trie *trie, const char *text, size_t bytes,
                                uint32_t token) CHOIR_MUST_USE;
void choir_added_destroy(choir_added_trie *trie);

/* One span of the text: an added token's, or (token == CHOIR_NO_ID) text between them. */
typedef struct choir_span {
    size_t begin, end;
    uint32_t token;
} choir_span;
typedef struct choir_spans {
    choir_span *data;
    size_t n, capacity;
} choir_spans;
choir_status choir_added_find(const choir_added_trie *trie, const choir_added_token *tokens,
                              const char *text, size_t bytes, bool parse_special,
                              choir_spans *out) CHOIR_MUST_USE;

/* ---- decoders */
typedef enum choir_decode_kind {
    CHOIR_DECODE_JOIN_SPACES, /* no decoder: tokens joined by spaces */
    CHOIR_DECODE_BYTE_LEVEL,
    CHOIR_DECODE_BYTE_FALLBACK,
    CHOIR_DECODE_FUSE,
    CHOIR_DECODE_STRIP,
    CHOIR_DECODE_REPLACE,
    CHOIR_DECODE_METASPACE,
} choir_decode_kind;

typedef struct choir_decode_stage {
    choir_decode_kind kind;
    bool fused;       /* what arrives are fragments of one token */
    bool whole;       /* fused, and must see all fragments at once */
    bool strip_first; /* METASPACE: the first token's marks vanish */
    char mark[4];     /* STRIP's and METASPACE's character */
    uint8_t mark_bytes;
    uint32_t start, stop;   /* STRIP */
    choir_pattern *pattern; /* REPLACE */
    char *content;
    size_t content_bytes;
} choir_decode_stage;

/* ---- the whole */
enum {
    CHOIR_TOKENIZER_MAX_STEPS = 32,
    CHOIR_MAX_CONTENT = 256, /* bytes that one step may insert */
    CHOIR_MAX_ADDED = 1024   /* bytes of an added token: one is looked for at every byte of a text */
};
enum { CHOIR_POST_TEXT = -1 }; /* in `post`: the text's own ids */

struct choir_tokenizer {
    choir_vocab vocab;
    choir_bpe bpe;
    choir_normal_step normal[CHOIR_TOKENIZER_MAX_STEPS];
    choir_split_step split[CHOIR_TOKENIZER_MAX_STEPS];
    choir_decode_stage decode[CHOIR_TOKENIZER_MAX_STEPS];
    size_t n_normal, n_split, n_decode;
    bool
        raw_bytes; /* the last split step would only write bytes as characters: the model does it */
    choir_added_token *added;
    size_t n_added, added_capacity;
    choir_added_trie trie, normal_trie; /* matched before and after normalising */
    int64_t *post; /* what add_special makes of the text: ids and CHOIR_POST_TEXT */
    size_t n_post, post_capacity;
    int32_t bos, eos;
    const char *kind;
};

/* Parsing: shared by JSON and GGUF. Each frees nothing on error; destroy does. */
choir_status choir_tokenizer_new(choir_tokenizer **out) CHOIR_MUST_USE;
/* After vocabulary, steps and stages are in place: tries, byte tables, the word cache. */
choir_status choir_tokenizer_finish(choir_tokenizer *tokenizer) CHOIR_MUST_USE;
choir_status choir_tokenizer_add_normal(choir_tokenizer *tokenizer, choir_normal_kind kind,
                                        choir_normal_step **out) CHOIR_MUST_USE;
choir_status choir_tokenizer_add_split(choir_tokenizer *tokenizer, choir_split_kind kind,
                                       choir_split_step **out) CHOIR_MUST_USE;
/* Puts `content` into the vocabulary if it is not there (behind all others), and into the added
 * tokens. */
choir_status choir_tokenizer_add_token(choir_tokenizer *tokenizer, const char *content,
                                       size_t bytes, choir_added_token token) CHOIR_MUST_USE;
choir_status choir_tokenizer_add_post(choir_tokenizer *tokenizer, int64_t item) CHOIR_MUST_USE;
choir_status choir_tokenizer_add_decode(choir_tokenizer *tokenizer, choir_decode_kind kind,
                                        choir_decode_stage **out) CHOIR_MUST_USE;
/* bos and eos from the text of a tokenizer_config.json. */
choir_status choir_tokenizer_read_config(choir_tokenizer *tokenizer, const char *json,
                                         size_t bytes) CHOIR_MUST_USE;
