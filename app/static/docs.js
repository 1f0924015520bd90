// Shows /openapi.json: a list of the operations; each with its parameters, bodies and answers; the fields of each body.
// The usual viewer is megabytes fetched from elsewhere; offline it is a blank page.
function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

// Descriptions with `code` between backquotes.
const prose = (text = "") =>
  text.split("`").map((part, index) => (index % 2 ? element("code", part) : part));

function table(heads, rows) {
  const head = element("tr", ...heads.map((text) => element("th", text)));
  for (const cell of head.children) cell.scope = "col";
  const lines = rows.map((cells) => element("tr", ...cells.map((cell) => element("td", ...[cell].flat(Infinity)))));
  return element("table", element("thead", head), element("tbody", ...lines));
}

function link(id, ...children) {
  const made = element("a", ...children);
  made.href = `#${id}`;
  return made;
}

const joined = (parts, between) => parts.flatMap((part, index) => (index ? [between, part] : [part]));

function type(schema) {
  if (!schema) return "";
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return link(name, name);
  }
  if (schema.const) return schema.const;
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return ["list of ", type(schema.items ?? schema.prefixItems?.[0])].flat();
  if (schema.properties)
    return ["fields ", ...joined(Object.keys(schema.properties).map((field) => element("code", field)), ", ")];
  if (schema.anyOf) return joined(schema.anyOf.map(type), " | ");
  return schema.format ?? schema.type ?? "any";
}

function operation(path, method, spec) {
  const verb = element("span", method.toUpperCase());
  verb.className = "method";
  const heading = element("h2", verb, ` ${path}`);
  heading.id = method + path;
  const parts = [heading, element("p", element("strong", spec.summary))];
  if (spec.description) parts.push(element("p", ...prose(spec.description)));
  if (spec.parameters)
    parts.push(
      element("h3", "Parameters"),
      table(["name", "type", "meaning"], spec.parameters.map((p) => [element("code", p.name), type(p.schema), prose(p.description)])),
    );
  if (spec.requestBody)
    parts.push(
      element("h3", "Body"),
      element("p", ...prose(spec.requestBody.description)),
      table(["content type", "body"], Object.entries(spec.requestBody.content).map(([kind, media]) => [kind, type(media.schema)])),
    );
  const answers = Object.entries(spec.responses).map(([status, answer]) => [
    status, type(answer.content?.["application/json"]?.schema), prose(answer.description),
  ]);
  parts.push(element("h3", "Answers"), table(["status", "body", "when"], answers));
  return element("section", ...parts);
}

function body(name, schema) {
  const heading = element("h3", name);
  heading.id = name;
  const fields = Object.entries(schema.properties ?? {}).map(([field, property]) => [
    element("code", field), type(property.allOf?.[0] ?? property), prose(property.description),
  ]);
  return element("section", heading, element("p", ...prose(schema.description)), table(["field", "type", "meaning"], fields));
}

const docs = document.getElementById("docs");
const load = (response) => (response.ok ? response.json() : Promise.reject(response.status));
const api = await fetch("openapi.json").then(load).catch((error) => {
  docs.append(element("p", "The description could not be loaded. Reload this page when the service is running."));
  throw error;
});
docs.append(...api.info.description.split("\n\n").map((text) => element("p", ...prose(text))));
const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, spec]) => [path, method, spec]));
const contents = operations.map(([path, method]) => element("li", link(method + path, `${method.toUpperCase()} ${path}`)));
docs.append(element("nav", element("ul", ...contents)));
docs.append(...operations.map((each) => operation(...each)));
docs.append(element("h2", "Bodies"), ...Object.entries(api.components.schemas).map(([name, schema]) => body(name, schema)));
document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();  // it was not there when the browser looked
