#!/usr/bin/env python3
"""Small tokenizers for every component Choir reads, and what Hugging Face tokenizers makes of nasty texts.

Writes tests/fixtures/tokenizer/: models/*.json (BPE models that merge across any boundary, so that a wrong
cut changes ids), texts.json, cases/NAME.json (the other parts of a tokenizer.json, the model's name, and
per text the ids with and without special tokens, and the decoded texts). Run from the source root with a
Python that has tokenizers 0.23. compare_tokenizer.py is the same on a megabyte of text."""
import argparse, json, os, random, unicodedata
from tokenizers import Tokenizer, Regex, models, trainers, pre_tokenizers as P

ROOT = 'tests/fixtures/tokenizer'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')
U, W = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?{U}*{W}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{U}+{W}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", '').replace(r'\p{N}{1,3}', r'\p{N}')
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
DEEPSEEK3 = (r'[!"#$%&' + "'" + r'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^' + '\r\n' + r'\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[' + '\r\n' +
             r']*|\s*[' + '\r\n' + r']+|\s+(?!\S)|\s+')
KIMI = (r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

def split(pattern, behavior='Isolated', invert=False, literal=False):
    return {'type': 'Split', 'pattern': {'String' if literal else 'Regex': pattern}, 'behavior': behavior, 'invert': invert}
def seq(key, *parts): return {'type': 'Sequence', key: list(parts)}
def pres(*parts): return seq('pretokenizers', *parts)
def bl(prefix=False, regex=True): return {'type': 'ByteLevel', 'add_prefix_space': prefix, 'trim_offsets': True, 'use_regex': regex}
def meta(scheme, cut=True): return {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': cut}
def digits(one): return {'type': 'Digits', 'individual_digits': one}
def rep(a, b, regex=False): return {'type': 'Replace', 'pattern': {'Regex' if regex else 'String': a}, 'content': b}
def tok(content, **flags):
    t = dict(content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True); t.update(flags); return t
def template(before, after=()):
    piece = lambda n: {'SpecialToken': {'id': n, 'type_id': 0}}
    a = {'Sequence': {'id': 'A', 'type_id': 0}}
    return {'type': 'TemplateProcessing', 'single': [piece(n) for n in before] + [a] + [piece(n) for n in after],
            'pair': [a, {'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': list(dict.fromkeys(list(before) + list(after)))}
def t(kind, **kw): return dict(type=kind, **kw)
BD = bl()
SPM_DECODER = seq('decoders', rep('▁', ' '), t('ByteFallback'), t('Fuse'), t('Strip', content=' ', start=1, stop=0))
GEMMA_DECODER = seq('decoders', rep('▁', ' '), t('ByteFallback'), t('Fuse'))
CHATML = [tok('<|endoftext|>'), tok('<|im_start|>'), tok('<|im_end|>')]

def configs():
    c = {}
    def add(name, model, **parts): c[name] = dict(model=model, **parts)
    def byte(name, pre, **kw): add(name, 'byte', pre_tokenizer=pre, decoder=BD, added=kw.pop('added', CHATML), **kw)
    byte('gpt2', bl()); byte('gpt2-prefix', bl(True)); byte('byte-no-regex', bl(False, False))
    byte('smollm', pres(digits(True), bl())); byte('digits-together', pres(digits(False), bl()))
    byte('llama3', pres(split(LLAMA3), bl(False, False)), post=seq('processors', bl(True), template(['<|im_start|>'])), ignore_merges=True)
    byte('qwen2', pres(split(QWEN2), bl(False, False)), normalizer=t('NFC'))
    byte('qwen35', pres(split(QWEN2.replace(r'\p{L}+', r'[\p{L}\p{M}]+').replace(r'[^\s\p{L}\p{N}]', r'[^\s\p{L}\p{M}\p{N}]')), bl(False, False)), normalizer=t('NFC'))
    byte('gpt4o', pres(split(GPT4O), bl(False, False))); byte('tekken', pres(split(TEKKEN), bl(False, False)), ignore_merges=True)
    byte('cl100k', pres(split(CL100K), bl(False, False))); byte('cl100k-removed-invert', pres(split(CL100K, 'Removed', True), bl(False, False)))
    byte('deepseek3', pres(split(r'\p{N}{1,3}'), split('[一-龥\u3040-ゟ゠-ヿ]+'), split(DEEPSEEK3), bl(False, False)))
    byte('deepseek-coder', pres(split('[\r\n]'), split(r'\s?\p{L}+'), split(r'\s?\p{P}+'), split('[一-龥ࠀ-一가-\ud7ff]+'.replace('\ud7ff', '퟿')), digits(True), bl(False, False)))
    byte('trailing-space', pres(split('[\r\n]'), split(r'\s+$'), bl(False, False)))
    byte('kimi', pres(split(KIMI), bl(False, False)))
    byte('falcon', pres(t('Punctuation', behavior='Contiguous'), bl(), digits(False), split('[0-9][0-9][0-9]')))
    byte('thousands', pres(split(r'\d{1,3}(?=(?:\d{3})*\b)'), split(GPT4O), bl(False, False)))
    byte('superbpe', pres(split(r'\p{N}+'), split(r'(?=(\d{3})+(?!\d))'), bl(False, False)))
    byte('bloom', pres(split(r' ?[^(\s|.,!?…。，、।۔،)]+'), bl(False, False)))
    for b in 'Isolated Removed MergedWithPrevious MergedWithNext Contiguous'.split():
        byte('split-' + b.lower(), pres(split(r'[aeiou\d]+|\s', b), bl(False, False)))
        byte('split-invert-' + b.lower(), pres(split(r'\w', b, True), bl(False, False)))
        byte('split-string-' + b.lower(), pres(split('e', b, False, True), bl(False, False)))
        byte('punctuation-' + b.lower(), pres(t('Punctuation', behavior=b), bl(False, False)))
    byte('whitespace', pres(t('Whitespace'), bl(False, False))); byte('whitespace-split', pres(t('WhitespaceSplit'), bl(False, False)))
    byte('bert', pres(t('BertPreTokenizer'), bl(False, False))); byte('delimiter', pres(t('CharDelimiterSplit', delimiter='e'), bl(False, False)))
    byte('fixed', pres(t('FixedLength', length=3), bl(False, False)))
    byte('bytes-first', pres(bl(False, False), split('Ġ', 'MergedWithNext', literal=True)))
    byte('normal-bytes', None, normalizer=t('ByteLevel'))
    for p, r in dict(w=r'\w+', nw=r'\W+', s=r'\s+', ns=r'\S+', b=r'\b', nb=r'\B', d=r'\d', h=r'\h+', dollar='$', caret='^', dot='.{2}', poss=r'\p{L}{1,3}+', fixedlazy=r'\p{L}{2}?',
                     upto=r'a{,2}', option=r'x(?i)a|b', dotall=r'(?m:a.b)|c', nested=r'[a-c[x-z]\d]+', and_=r'[\p{L}&&[^a-m]]+', notand=r'[^\p{L}&&[a-m]]+', lookbehind=r'(?<=a)\w',
                     atomic=r'(?>\s+)\S', script=r'\p{Han}+|\p{Hiragana}+|\p{Cyrillic}+', notp=r'\P{L}+|\p{^N}', inset=r'[\S\d]+', kelvin=r'(?i:k|ſ|ß)').items():
        byte('regex-' + p, pres(split(r), bl(False, False)))
    for n in 'NFC NFD NFKC NFKD Lowercase StripAccents Nmt'.split():
        byte('normal-' + n.lower(), bl(), normalizer=t(n))
    byte('normal-strip', bl(), normalizer=t('Strip', strip_left=True, strip_right=True)); byte('normal-strip-left', bl(), normalizer=t('Strip', strip_left=True, strip_right=False))
    byte('normal-sequence', bl(), normalizer=seq('normalizers', t('NFD'), t('StripAccents'), t('Lowercase'), rep(r'\s+', ' ', True), rep('a', 'aa')))
    flags = [tok('<s>', lstrip=True), tok('</s>', rstrip=True), tok('<b>', lstrip=True, rstrip=True), tok('[w]', single_word=True), tok('word', single_word=True, special=False),
             tok('Néw', normalized=True, special=False), tok('x', special=False, normalized=True, single_word=True), tok('<s><s>', special=False), tok('  ', special=False), tok('\n', rstrip=True, special=False)]
    byte('added-flags', bl(), added=flags); byte('added-flags-normal', bl(), added=flags, normalizer=seq('normalizers', t('NFD'), t('Lowercase')))
    byte('roberta', bl(), post=t('RobertaProcessing', sep=['<|im_end|>', 2], cls=['<|im_start|>', 1], trim_offsets=True, add_prefix_space=False))
    byte('bert-post', bl(), post=t('BertProcessing', sep=['<|im_end|>', 2], cls=['<|im_start|>', 1]))
    byte('template', bl(), post=template(['<|im_start|>', '<|endoftext|>'], ['<|im_end|>']))
    S = [tok('<unk>'), tok('<s>'), tok('</s>')]
    def spm(name, **kw): add(name, kw.pop('model', 'fallback'), added=kw.pop('added', S), **kw)
    legacy = seq('normalizers', t('Prepend', prepend='▁'), rep(' ', '▁'))
    spm('llama2', normalizer=legacy, decoder=SPM_DECODER, post=template(['<s>']))
    spm('llama2-normal-added', normalizer=legacy, decoder=SPM_DECODER, added=[tok('<unk>', normalized=True), tok('<s>', normalized=True), tok('</s>', normalized=True, rstrip=True)], post=template(['<s>']))
    spm('gemma', normalizer=rep(' ', '▁'), pre_tokenizer=split(' ', 'MergedWithPrevious', literal=True), decoder=GEMMA_DECODER, added=S + [tok('\n\n', special=False), tok('▁▁', special=False)])
    for scheme in 'always first never'.split():
        for cut in (True, False):
            spm(f'metaspace-{scheme}-{"cut" if cut else "whole"}', pre_tokenizer=meta(scheme, cut), decoder=meta(scheme, cut), post=template(['<s>'], ['</s>']))
    spm('metaspace-sequence', pre_tokenizer=pres(t('WhitespaceSplit'), meta('always')), decoder=seq('decoders', t('ByteFallback'), meta('always')))
    spm('unknown', model='unknown', pre_tokenizer=t('WhitespaceSplit')); spm('unknown-fused', model='unknown', pre_tokenizer=t('WhitespaceSplit'), fuse_unk=True)
    spm('unknown-none', model='unknown', pre_tokenizer=t('WhitespaceSplit'), unk_token=None)
    spm('fallback-partial', model='partial', normalizer=rep(' ', '▁'), decoder=GEMMA_DECODER, fuse_unk=True)
    spm('decoder-fused', normalizer=rep(' ', '▁'), decoder=seq('decoders', t('Fuse'), rep('▁', ' '), t('Strip', content='a', start=2, stop=1), rep('[aeiou]+', '<>', True), t('ByteFallback')))
    spm('decoder-strip', normalizer=rep(' ', '▁'), decoder=seq('decoders', t('Strip', content='▁', start=1, stop=0), t('ByteFallback'), rep('e', '')))
    spm('decoder-bytelevel-last', decoder=seq('decoders', t('ByteFallback'), bl(), rep('e', 'E')))
    spm('decoder-none')
    return c

TEXTS = ['', ' ', 'a', '  ', '\n', 'Hello world', "I'll don't WE'VE it's 'S 's ' s", 'Hello  world   12345 is 2024!', ' leading and trailing ', '   a   b\t\tc \n\n  d\r\n\r\n e\n', 'café naïve Å å é e\u0301 ﬁ ½ ² Ⅷ ٣ ①',
         '日本語テキスト、漢字かな。カタカナ', '中文，数字１２３ and 123456789', '한국어 텍스트 ㄱㄴ', 'Привет, мир! Ёлка', 'مرحبا بالعالم ۱۲۳', 'नमस्ते दुनिया क्षि', 'สวัสดีชาวโลก', 'שלום עולם', 'Ελληνικά ς Σ ΑΣ', '😀😃 👨‍👩‍👧‍👦 🇩🇪 ☃️', 'İIıi ẞß ſ K Å Ω',
         '<|im_start|>user\nhi<|im_end|>\n', '<s> a </s> b <b> c', ' <s>  <s><s></s>  x', 'word words word. sword x xx x', '[w]a [w] a[w] [w][w]', 'NéwNew NE\u0301W new', '<|im_sta <|endoftext|', '<0x41><0x0A> <unk>▁▁a ▁', '\u00a0nbsp\u2003em\u180emvs\u200bzw\u2028ls\u0085nel', '\x00\x01nul\x7f\ufeffbom\ufffd', '\t\v\f mixed \t\n \n',
         'x=1;y==22;z+=333.4444e-5', 'def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass', 'https://example.com/a/b?c=d&e=%20#f', 'CamelCaseHTTPServer XMLHttpRequest iPhone', 'UPPER lower MiXeD ABCdef', '1 12 123 1234 12345 123456 1234567', '1,234,567.89 -3.14 1e10', 'a.b,c;d:e!f?g', '"quoted" \'single\' (paren) [brack] {brace}',
         '...---___***///\n\n///', ' /\n/ \n /', 'a\u0300\u0301\u0327b a\u0327\u0301\u0300', '\u1100\u1161\u11a8 각', '\u212b \u2126 \ufb01 \u3392', 'Ⓐⓑ🄰 \u24b6x', '\U00011f02\U00031350\U0002ebf0 \U00010d40', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', ' ' * 70 + 'x', 'abc' * 30, '\n' * 20, 'é' * 40, 'to the the t he',
         'e\u0301' * 20, '0' * 40, 'a b c d e f g h i j k l m n o p', "'s't're've'm'll'd", '\r\r\n\n\r', 'x\u3000y\u3000\u3000z', '\U0010ffff\ue000', 'tab\tand  two\t\tspaces', 'K k ſs SS ß']
CORPUS = TEXTS + ['the quick brown fox jumps over the lazy dog', 'in the beginning there was the word', 'and then the other thing that they were thinking of', 'int main(void)\n{\n    return 0;\n}\n', '  the  the', 'hello hello world 1234 2024',
                  '日本語 日本語 漢字', 'Привет Привет мир', 'café café naïve', '▁the ▁world ▁a ▁▁', 'don\'t can\'t it\'s we\'ve', '\n\n\n    return\n'] * 6

def train_models():
    alphabet = sorted(P.ByteLevel.alphabet())
    def train(pre, trainer, texts, **kw):
        tk = Tokenizer(models.BPE(**kw)); tk.pre_tokenizer = pre
        tk.train_from_iterator(texts, trainer); return json.loads(tk.to_str())['model']
    out = {}
    out['byte'] = train(P.ByteLevel(add_prefix_space=False, use_regex=False), trainers.BpeTrainer(vocab_size=620, initial_alphabet=alphabet, show_progress=False,
                        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>']), CORPUS)
    marked = [x.replace(' ', '▁') for x in CORPUS]
    hexes = [f'<0x{i:02X}>' for i in range(256)]
    some = trainers.BpeTrainer(vocab_size=560, special_tokens=['<unk>', '<s>', '</s>'] + hexes, limit_alphabet=90, show_progress=False)
    out['fallback'] = train(P.Split('\x02', 'isolated'), some, marked, unk_token='<unk>', byte_fallback=True)
    few = trainers.BpeTrainer(vocab_size=300, special_tokens=['<unk>', '<s>', '</s>'] + hexes[:0xC4], limit_alphabet=60, show_progress=False)
    out['partial'] = train(P.Split('\x02', 'isolated'), few, marked, unk_token='<unk>', byte_fallback=True)
    none = trainers.BpeTrainer(vocab_size=160, special_tokens=['<unk>', '<s>', '</s>'], limit_alphabet=60, show_progress=False)
    out['unknown'] = train(P.WhitespaceSplit(), none, CORPUS, unk_token='<unk>')
    return out

def assemble(cfg, bpe):
    """the tokenizer.json of a case, as an object"""
    model = dict(bpe); model['type'] = 'BPE'
    for k in ('ignore_merges', 'fuse_unk', 'unk_token'):
        if k in cfg: model[k] = cfg[k]
    ids = dict(model['vocab']); added = []
    for a in cfg['added']:
        if a['content'] not in ids: ids[a['content']] = len(ids)
        added.append(dict(a, id=ids[a['content']]))
    post = json.loads(json.dumps(cfg.get('post')))
    for p in ([] if post is None else post.get('processors', [post])):
        if p['type'] == 'TemplateProcessing': p['special_tokens'] = {n: {'id': n, 'ids': [ids[n]], 'tokens': [n]} for n in p['special_tokens']}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added, 'normalizer': cfg.get('normalizer'), 'pre_tokenizer': cfg.get('pre_tokenizer'),
            'post_processor': post, 'decoder': cfg.get('decoder'), 'model': model}

def expect(hf, text):
    hf.encode_special_tokens = False
    ids = hf.encode(text).ids
    hf.encode_special_tokens = True
    plain = hf.encode(text, add_special_tokens=False).ids
    hf.encode_special_tokens = False
    full, skipped = decode(hf, ids, False), decode(hf, ids, True)
    # 0 stands for "the same as the field before", the text itself before the first decoded one
    return [ids, plain if plain != ids else 0, full if full != text else 0, skipped if skipped != full else 0]

def decode(hf, ids, skip):
    try: return hf.decode(ids, skip_special_tokens=skip)
    except BaseException: return None  # the reference panics where Strip's stop meets an empty token

def main():
    a = argparse.ArgumentParser(); a.add_argument('--only'); a = a.parse_args()
    os.makedirs(ROOT + '/models', exist_ok=True); os.makedirs(ROOT + '/cases', exist_ok=True)
    bpe = train_models()
    dump = lambda x: json.dumps(x, ensure_ascii=False, separators=(',', ':'))
    for n, m in bpe.items(): open(f'{ROOT}/models/{n}.json', 'w').write(dump(m) + '\n')
    open(f'{ROOT}/texts.json', 'w').write(dump(TEXTS) + '\n')
    for n, cfg in configs().items():
        if a.only and a.only not in n: continue
        full = assemble(cfg, bpe[cfg['model']])
        hf = Tokenizer.from_str(json.dumps(full))
        cases = [expect(hf, x) for x in TEXTS]
        full['model'] = {k: v for k, v in full['model'].items() if k not in ('vocab', 'merges')}
        full['model']['file'] = cfg['model']
        open(f'{ROOT}/cases/{n}.json', 'w').write(dump({'tokenizer': full, 'cases': cases}) + '\n')
    print(len(configs()), 'cases')

if __name__ == '__main__': main()
