// views.mjs DIR: runs LuCI's pages of cgtproxy, load() and render(), with stand-ins of what LuCI has,
// and prints what they do: `option SECTION NAME`, `offered NAME VALUE`, `call OBJECT METHOD`, `string TEXT`,
// `text TEXT` for what stands in a page. Exits with 1 where a page fails.
import fs from 'node:fs';

const dir = process.argv[2] + '/htdocs/luci-static/resources/';
const printed = new Set();
const say = (...words) => printed.add(words.join(' '));

String.prototype.format = function (...args) {
	return this.replace(/%[0-9.]*m?[a-zA-Z]/g, () => String(args.shift()));
};
const extend = (members) => {
	const made = function () {};
	Object.assign(made.prototype, members);
	return Object.assign(new made(), { members });
};
const E = (tag, attributes, children) => {
	for (const child of [children].flat())
		if (typeof child == 'string')
			say('text', child);
		else if (child === undefined)
			throw new Error(`nothing in <${tag}>`);
	return { tag, attributes, children };
};
class Option {
	constructor(name) { this.option = name; }
	value(key) {
		if (key === undefined)
			throw new Error(`a value of ${this.option} that is none`);
		say('offered', this.option, key);
	}
	depends() {}
}
class Section {
	constructor(type) { this.type = type; this.children = []; this.tabs = new Set(); }
	tab(name) { this.tabs.add(name); }
	option(kind, name) {
		if (typeof kind != 'function' || this.children.some(other => other.option == name))
			throw new Error(`option ${name} of ${this.type}`);
		say('option', this.type, name);
		this.children.push(new kind(name));
		return this.children.at(-1);
	}
	taboption(tab, ...rest) {
		if (!this.tabs.has(tab))
			throw new Error(`no tab ${tab}`);
		return this.option(...rest);
	}
}
class GridSection extends Section {}
class TypedSection extends Section {}
class Map_ {
	section(kind, type) { return new kind(type); }
	render() { return 'map'; }
}
const kinds = Object.fromEntries(['Value', 'Flag', 'ListValue', 'DynamicList', 'DummyValue'].map(name => [name, class extends Option {}]));

const replies = JSON.parse(fs.readFileSync(0, 'utf8'));
const sections = {
	'cgtproxy.tproxy': [{ '.name': 'mihomo' }], 'cgtproxy.route': [{ '.name': 'r', name: 'vpn-1' }],
};
const modules = {
	baseclass: { extend }, view: { extend },
	form: { Map: Map_, GridSection, TypedSection, ...kinds },
	rpc: { declare: ({ object, method, expect }) => () => {
		say('call', object, method);
		const [key] = Object.keys(expect || {});
		return Promise.resolve(key ? replies[method][key] : replies[method]);
	} },
	uci: { load: (name) => { say('uci', name); return Promise.resolve(); },
		sections: (config, type) => sections[`${config}.${type}`] || [], get: () => null },
	poll: { add: (f) => polled.push(f) },
	ui: { showModal: (title) => { say('modal', title); }, hideModal: () => {}, changes: { apply: () => { say('applied'); } } },
};
const polled = [];
const svg = () => ({ setAttribute() {}, appendChild() {} });
const globals = {
	E, _: (text) => { say('string', text); return text; },
	L: { resolveDefault: (value, or) => Promise.resolve(value).catch(() => or), hasViewPermission: () => true },
	window: { setTimeout: (f) => polled.push(f) },
	document: { body: { classList: { contains: () => false } }, createElementNS: svg, getElementById: () => ({ replaceChildren() {}, querySelector: () => null }) },
};
function load(name) {
	if (modules[name])
		return modules[name];
	const text = fs.readFileSync(dir + name.replace('.', '/') + '.js', 'utf8');
	const needs = [...text.matchAll(/^'require ([a-z.]+)(?: as ([a-z]+))?';$/gm)];
	const names = [...needs.map(([, path, as]) => as || path), ...Object.keys(globals)];
	const values = [...needs.map(([, path]) => load(path)), ...Object.values(globals)];
	return modules[name] = new Function(...names, text)(...values);
}
for (const file of fs.readdirSync(dir + 'view/cgtproxy')) {
	const page = load('view/cgtproxy/' + file.replace('.js', ''));
	await page.render(await page.load());
	for (const f of polled.splice(0))
		await f();
	if (page.handleSaveApply) {
		page.handleSave = () => Promise.resolve();
		await page.handleSaveApply(null, '0');
	}
}
console.log([...printed].join('\n'));
